"""Peak memory of routed layers beside the official form, which multiplies by a mask or slices a weight, forward and with backward.

    python benchmarks/bench_routed_memory.py [--json NAME.json] [--dtype bfloat16] [--share 0.5]

Each form of each layer runs in a process of its own, once to load and once to be measured, and two figures are kept: the bytes that it took
from torch's allocator at most, which are the same on every run, and the rise of the resident memory, which has in it what oneDNN and loops
of C++ take for themselves. Results and gradients are among both; inputs and parameters are not. A layer is gated first: results and
gradients have to be those of the official form.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import environment
import taskloom
from allocated import peak_allocated
from bench_routed_dit import ARMS, Case
from harness import check_close
from peaks import resident_rise
from rows_window import mask_of, starts

OURS, MASKED, SLICED = "ours", "masked", "sliced"
PASSES = ("forward", "both")
SAMPLES = 8
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Layer:
    """Inputs and parameters, and the forms that compute with them: ours, the official one, and perhaps others."""

    leaves: tuple[Tensor, ...]
    forms: dict[str, Callable[[], Tensor]]

    @property
    def official(self) -> str:
        """The official form's name."""
        return MASKED if MASKED in self.forms else SLICED

    def step(self, form: str) -> list[Tensor]:
        """The output's sum, differentiated by all leaves."""
        return list(torch.autograd.grad(self.forms[form]().sum(), self.leaves))

    def run(self, form: str, which: str) -> Any:
        """One pass of a form."""
        if which == "both":
            return self.step(form)
        with torch.no_grad():
            return self.forms[form]()


def _leaves(dtype: torch.dtype, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    return tuple((one / max(one[0].numel(), 1) ** 0.5 if place else one).to(dtype).requires_grad_() for place, one in enumerate(made))


def _window(channels: int, share: float, dtype: torch.dtype, dims: int, dim: int) -> tuple[Tensor, int, Tensor]:
    """Starts, the width, and the mask that they mean."""
    width = max(1, int(share * channels))
    start = starts(SAMPLES, channels, width)
    shape = [1] * dims
    shape[0], shape[dim] = SAMPLES, channels
    return start, width, mask_of(start, width, channels, dtype).view(shape)


def window_linear(share: float, dtype: torch.dtype, channels: int = 1024, rows: int = 256) -> Layer:
    """Queries, keys and values of a transformer."""
    x, weight = leaves = _leaves(dtype, (SAMPLES, rows, channels), (3 * channels, channels))
    start, width, mask = _window(channels, share, dtype, 3, 2)
    forms = {OURS: lambda: taskloom.window_linear(x, weight, start=start, width=width), MASKED: lambda: functional.linear(x * mask, weight)}
    return Layer(leaves, forms)


def window_conv2d(share: float, dtype: torch.dtype, channels: int = 256, side: int = 32) -> Layer:
    """A 3 by 3 convolution of a U-Net."""
    x, weight = leaves = _leaves(dtype, (SAMPLES, channels, side, side), (channels, channels, 3, 3))
    start, width, mask = _window(channels, share, dtype, 4, 1)
    forms = {
        OURS: lambda: taskloom.window_conv2d(x, weight, start=start, width=width, padding=1),
        MASKED: lambda: functional.conv2d(x * mask, weight, padding=1),
    }
    return Layer(leaves, forms)


def window_layer_norm(share: float, dtype: torch.dtype, channels: int = 1024, rows: int = 256) -> Layer:
    """The modulated norm at the head of a DiT block."""
    x, shift, scale = leaves = _leaves(dtype, (SAMPLES, rows, channels), (SAMPLES, channels), (SAMPLES, channels))
    start, width, mask = _window(channels, share, dtype, 3, 2)

    def masked() -> Tensor:
        return functional.layer_norm(x * mask, (channels,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    return Layer(leaves, {OURS: lambda: taskloom.window_layer_norm(x, shift, scale, start=start, width=width), MASKED: masked})


def prefix_conv2d(share: float, dtype: torch.dtype, channels: int = 512, side: int = 14) -> Layer:
    """A 3 by 3 convolution of a slimmable network, whose official form slices the weight."""
    active = max(1, int(share * channels))
    x, weight = leaves = _leaves(dtype, (SAMPLES, active, side, side), (channels, channels, 3, 3))
    forms = {
        OURS: lambda: taskloom.prefix_conv2d(x, weight, None, active, padding=1),
        SLICED: lambda: functional.conv2d(x, weight[:active, :active], padding=1),
    }
    return Layer(leaves, forms)


def routed_dit_block(share: float, dtype: torch.dtype, model: str = "S", tokens: int = 256) -> Layer:
    """A whole block of DTR beside the official one."""
    sizes = {"model": model, "beta": share, "batch": SAMPLES, "tokens": tokens}
    case = Case.make(argparse.Namespace(**sizes, dtype=str(dtype).removeprefix("torch."), device="cpu"))
    leaves = (case.x, case.c, *case.block.parameters())
    return Layer(leaves, {OURS: lambda: ARMS["routed"](case), MASKED: lambda: ARMS["masked"](case), "plain": lambda: ARMS["plain"](case)})


LAYERS: dict[str, Callable[..., Layer]] = {
    one.__name__: one for one in (window_linear, window_conv2d, window_layer_norm, routed_dit_block, prefix_conv2d)
}


def gate(layer: Layer, dtype: torch.dtype) -> None:
    """Raise unless ours has the results and gradients of the official form."""
    for which in PASSES:
        check_close(layer.run(OURS, which), layer.run(layer.official, which), tolerance=TOLERANCES[dtype])


def peaks_here(layer: Layer, form: str, which: str) -> dict[str, int]:
    """What one pass takes at most, by both measures, when everything it uses is loaded."""
    layer.run(form, which)
    return {
        "allocated": peak_allocated(lambda: layer.run(form, which)),
        "resident": resident_rise(lambda: layer.run(form, which)),
    }


def peaks_elsewhere(name: str, form: str, which: str, given: argparse.Namespace) -> dict[str, int]:
    """The same in a fresh process."""
    sizes = [f"--share={given.share}", f"--dtype={given.dtype}"]
    command = [sys.executable, __file__, "--only", name, form, which, *sizes]
    # Every tensor of some size is given back when it is freed, so that what an earlier run left does not hide what a later one takes.
    variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Gate of a layer, and the peaks of its forms."""
    dtype = getattr(torch, given.dtype)
    layer = LAYERS[name](given.share, dtype)
    gate(layer, dtype)
    found = {which: {form: peaks_elsewhere(name, form, which, given) for form in layer.forms} for which in PASSES}
    for which, forms in found.items():
        shown = [f"{form} {one['allocated'] / 1e6:.1f} / {one['resident'] / 1e6:.1f}" for form, one in forms.items()]
        print(f"{name:<20}{which:<8} MB from torch's allocator / resident: {', '.join(shown)}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of routed layers.")
    parser.add_argument("--json", type=Path, help="file to keep the figures in, under benchmarks/results")
    parser.add_argument("--dtype", default="float32", choices=[str(dtype).removeprefix("torch.") for dtype in TOLERANCES])
    parser.add_argument("--share", type=float, default=0.5, help="of the channels that a window or a prefix has")
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        name, form, which = given.only
        print(json.dumps(peaks_here(LAYERS[name](given.share, getattr(torch, given.dtype)), form, which)))
        return
    sizes = {"dtype": given.dtype, "share": given.share, "samples": SAMPLES, "threads": torch.get_num_threads()}
    record: dict[str, Any] = {"sizes": sizes, "peak_bytes": {name: measure(name, given) for name in LAYERS}}
    if given.json:
        record = {"device": environment.device(), "versions": environment.versions(), "commit": environment.commit(), **record}
        path = Path(__file__).parent / "results" / given.json.name
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

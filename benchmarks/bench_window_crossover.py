"""Where a dense layer of masked samples becomes faster than windows, and loops than products: what the ops' constants come from.

    python benchmarks/bench_window_crossover.py [--json NAME.json]

For each share of channels every way is forced, and timed in turn by the time of the one thread that makes them. A ratio above 1 says that
the products of windows are the faster way. A convolution, and its input's gradient, go by loops of our own too, and by oneDNN's
convolutions of windows: of eight windows, or of one that all samples have. A convolution of normed maps has windows as its op takes them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import environment
import taskloom
from spread import spread, summary
from taskloom.ops.routed import _conv_loops, _conv_products, _linear_products

SHARES = (0.25, 0.5, 0.6, 0.7, 0.8, 0.9)
IMAGES = ((64, 56), (256, 28), (512, 14), (512, 7))
SEQUENCES = ((64, 1), (64, 4), (64, 16), (32, 64), (8, 256))
CHANNELS = 1024
SAMPLES = 8
# The ways beside products of windows.
WAYS = {"conv2d": ("dense", "loops", "onednn"), "linear": ("dense",), "norm_conv2d": ("dense",)}

# The package has the function under the module's name.
_norm_conv2d = importlib.import_module("taskloom.ops.routed.window_norm_conv2d")

Call = Callable[[], Any]


def _starts(samples: int, most: int) -> Tensor:
    return torch.randint(0, most + 1, (samples,), generator=torch.Generator().manual_seed(3))


def _calls(y: Callable[..., Tensor], x: Tensor, weight: Tensor) -> Iterator[tuple[str, Call]]:
    """Forward, and backward for x and the weight."""
    yield "forward", lambda: y(x, weight)
    leaves = (x.detach().requires_grad_(), weight.detach().requires_grad_())
    made = y(*leaves)
    gradient = torch.ones_like(made)
    yield "backward", lambda: torch.autograd.grad(made, leaves, gradient, retain_graph=True)


def layers() -> Iterator[tuple[str, str, float, Callable[..., Tensor], Tensor, Tensor]]:
    """Kind, name, share of channels, the layer as a function, x and weight."""
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        for channels, side in IMAGES:
            x, weight = torch.randn(SAMPLES, channels, side, side).to(dtype), torch.randn(channels, channels, 3, 3).to(dtype)
            for share in SHARES:
                width = int(share * channels)
                named = {"start": _starts(SAMPLES, channels - width), "width": width, "padding": 1}
                name = f"{channels} channels, {side} by {side}, {kind}"
                yield "conv2d", f"conv2d, {name}", share, _bound(taskloom.window_conv2d, named), x, weight
                one = {**named, "start": 0}
                yield "conv2d", f"conv2d, one window, {name}", share, _bound(taskloom.window_conv2d, one), x, weight
                yield "norm_conv2d", f"norm_conv2d, {name}", share, _normed(named), x, weight
    weight = torch.randn(CHANNELS, CHANNELS)
    for samples, rows in SEQUENCES:
        x = torch.randn(samples, rows, CHANNELS)
        for share in SHARES:
            width = int(share * CHANNELS)
            yield (
                "linear",
                f"linear, {samples} samples of {rows} rows",
                share,
                _linear(_starts(samples, CHANNELS - width), width),
                x,
                weight,
            )


def _bound(layer: Callable[..., Tensor], named: dict[str, Any]) -> Callable[..., Tensor]:
    return lambda x, weight: layer(x, weight, **named)


def _normed(named: dict[str, Any]) -> Callable[..., Tensor]:
    return lambda x, weight: taskloom.window_norm_conv2d(x, None, None, weight, groups=4, **named)


def _linear(start: Tensor, width: int) -> Callable[..., Tensor]:
    """Forward the composition is called itself: the compiled kernel chooses a way that cannot be forced."""

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        if weight.requires_grad:
            return taskloom.window_linear(x, weight, start=start, width=width)
        return _linear_products.window_linear(x, weight, None, start, width, None, None, 0, None)

    return layer


def _seconds(kind: str, call: Call, way: str) -> float:
    patches = {
        "conv2d": [
            patch.object(_conv_products, "choose_way", lambda *_, **__: "products" if way == "windows" else way),
            patch.object(_conv_loops, "are_faster", lambda *_: way == "loops"),
        ],
        "linear": [patch.object(_linear_products, "is_dense", lambda *_: way == "dense")],
        "norm_conv2d": [patch.object(_norm_conv2d, "_dense_from", lambda *_: 0.0 if way == "dense" else 2.0)],
    }
    with ExitStack() as forced:
        for one in patches[kind]:
            forced.enter_context(one)
        begin = time.thread_time()
        call()
        return time.thread_time() - begin


def measure(kind: str, call: Call, rounds: int, others: Sequence[str]) -> dict[str, Any]:
    """Seconds of every way, and the others' over those of the windows' products, round by round."""
    taken: dict[str, list[float]] = {way: [] for way in ("windows", *others)}
    for _ in range(rounds + 1):
        for way, times in taken.items():
            times.append(_seconds(kind, call, way))
    found: dict[str, Any] = {way: summary(times[1:]) for way, times in taken.items()}
    for way in others:
        ratios = [theirs / own for own, theirs in zip(taken["windows"][1:], taken[way][1:], strict=True)]
        found[f"{way}_over_windows"] = summary(ratios)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Where a dense layer becomes faster than products of windows.")
    parser.add_argument("--json", type=Path, help="file to keep the figures in, under benchmarks/results")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    shown = Table("layer", "pass", "share of channels", "windows, ms", "dense / windows", "loops / windows", "oneDNN / windows")
    found = []
    for kind, name, share, layer, x, weight in layers():
        others = WAYS[kind]
        for direction, call in _calls(layer, x, weight):
            if kind == "norm_conv2d" and direction == "backward":
                continue
            one = measure(kind, call, given.rounds, others)
            found.append({"layer": name, "pass": direction, "share": share, **one})
            milliseconds = f"{1e3 * one['windows']['median']:.2f}"
            shown.add_row(name, direction, f"{share:.2f}", milliseconds, *(spread(one[f"{way}_over_windows"]) for way in others))
    Console(width=140).print(shown)
    if given.json:
        facts = {"device": environment.device(), "versions": environment.versions(), "threads": 1, **environment.commit()}
        (Path(__file__).parent / "results" / given.json.name).write_text(json.dumps({**facts, "layers": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Time and memory of a routed DiT block beside the plain block and the masked block of DTR's official code, in one run.

    python benchmarks/bench_routed_dit.py [--json NAME.json] [--device cuda] [--dtype bfloat16] [--model L] [--beta 0.8]

The arms share one block's parts, so that they differ in the routing alone. The routed arm is gated first: output and gradients have to be
those of the masked block. Memory is what a forward keeps for its backward, and on a GPU the peak of both too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import environment
from bench_weighted_ce import peak_on_gpu, timed
from harness import check_close
from spread import spread, summary
from taskloom.methods.channels.dtr import RoutedDiTBlock, dtr_window
from taskloom.methods.channels.dtr.dit import inside

# Channels and attention heads of DiT-S, B, L and XL; 256 tokens are a latent of 32 x 32 in patches of 2 x 2.
MODELS = {"S": (384, 6), "B": (768, 12), "L": (1024, 16), "XL": (1152, 16)}
ROUTED = "routed"
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Case:
    """A block, and a batch whose timesteps are drawn as in training."""

    block: RoutedDiTBlock
    x: Tensor
    c: Tensor
    t: Tensor
    mask: Tensor

    @classmethod
    def make(cls, given: argparse.Namespace) -> Case:
        torch.manual_seed(0)
        channels, heads = MODELS[given.model]
        window = dtr_window(1000, channels, given.beta)
        block = RoutedDiTBlock(channels, heads, window=window)
        x, c, t = torch.randn(given.batch, given.tokens, channels), torch.randn(given.batch, channels), torch.randint(1000, (given.batch,))
        start, width = window(t)
        mask = inside(start, width, channels)
        dtype = getattr(torch, given.dtype)
        x, c = (one.to(given.device, dtype).requires_grad_() for one in (x, c))
        return cls(block.to(given.device, dtype), x, c, t.to(given.device), mask.to(given.device, dtype).unsqueeze(1))


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _eager(case: Case, z: Tensor) -> Tensor:
    """The block of facebookresearch/DiT."""
    block = case.block
    shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(case.c).chunk(6, dim=1)
    z = z + gate1.unsqueeze(1) * block.attn(_modulated(block.norm1(z), shift1, scale1))
    return z + gate2.unsqueeze(1) * block.mlp(_modulated(block.norm2(z), shift2, scale2))


ARMS: dict[str, Callable[[Case], Tensor]] = {
    ROUTED: lambda case: case.block(case.x, case.c, case.t),
    "plain": lambda case: _eager(case, case.x),
    "masked": lambda case: _eager(case, case.x * case.mask) + case.x * (1 - case.mask),
}


def gradients(case: Case, arm: str) -> list[Tensor]:
    """The output's sum, differentiated: what a training step does with a block."""
    y = ARMS[arm](case)
    return list(torch.autograd.grad(y.sum(), (case.x, case.c, *case.block.parameters())))


def gate(case: Case) -> None:
    """Raise unless the routed block's output and gradients are those of the masked one."""
    with torch.no_grad():
        check_close(ARMS[ROUTED](case), ARMS["masked"](case), tolerance=TOLERANCES[case.x.dtype])
    check_close(gradients(case, ROUTED), gradients(case, "masked"), tolerance=TOLERANCES[case.x.dtype])


def kept_bytes(case: Case, arm: str) -> int:
    """What a forward keeps for its backward, without parameters and inputs."""
    kept: dict[int, int] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = ARMS[arm](case)
    del y
    given = {tensor.untyped_storage().data_ptr() for tensor in (case.x, case.c, *case.block.parameters())}
    return sum(size for place, size in kept.items() if place not in given)


def _finished(case: Case, arm: str, backward: bool) -> Callable[[], Any]:
    def run() -> Any:
        with torch.set_grad_enabled(backward):
            result = gradients(case, arm) if backward else ARMS[arm](case)
        if case.x.is_cuda:
            torch.cuda.synchronize()
        return result

    return run


def measure(case: Case, backward: bool, rounds: int) -> dict[str, Any]:
    """Seconds of each arm, in turn, the ratios to the plain block round by round, and memory."""
    calls = {arm: _finished(case, arm, backward) for arm in ARMS}
    for call in calls.values():
        call()
    taken: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    for number in range(rounds):
        for arm in list(ARMS)[:: 1 if number % 2 == 0 else -1]:
            taken[arm].append(timed(calls[arm]))
    wall, processor = ({arm: [one[place] for one in pairs] for arm, pairs in taken.items()} for place in range(2))
    found: dict[str, Any] = {
        "seconds": {arm: summary(one) for arm, one in wall.items()},
        "over_plain": {arm: summary([a / b for a, b in zip(one, wall["plain"], strict=True)]) for arm, one in wall.items()},
        "cpu_over_plain": {arm: summary([a / b for a, b in zip(one, processor["plain"], strict=True)]) for arm, one in processor.items()},
    }
    if case.x.is_cuda:
        found["peak_bytes"] = {arm: peak_on_gpu(call) for arm, call in calls.items()}
    return found


def _print(name: str, found: dict[str, Any], kept: dict[str, int]) -> None:
    print(name)
    for arm, seconds in found["seconds"].items():
        ratio = f"{spread(found['over_plain'][arm])} of plain, processor time {spread(found['cpu_over_plain'][arm])}"
        peak = f", peak {found['peak_bytes'][arm] / 1e6:.0f} MB" if "peak_bytes" in found else ""
        print(f"  {arm:<8}{1e3 * seconds['median']:9.2f} ms, {ratio}, keeps {kept[arm] / 1e6:.1f} MB{peak}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="A routed DiT block beside the plain and the masked one.")
    parser.add_argument("--json", type=Path, help="file to keep the figures in, under benchmarks/results")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=[str(dtype).removeprefix("torch.") for dtype in TOLERANCES])
    parser.add_argument("--model", default="S", choices=MODELS)
    parser.add_argument("--beta", type=float, default=0.8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10)
    given = parser.parse_args()
    case = Case.make(given)
    gate(case)
    sizes = {name: getattr(given, name) for name in ("device", "dtype", "model", "beta", "batch", "tokens")}
    kept = {arm: kept_bytes(case, arm) for arm in ARMS}
    record: dict[str, Any] = {"sizes": sizes, "threads": torch.get_num_threads(), "kept_bytes": kept}
    for name, backward in (("forward", False), ("both", True)):
        record[name] = measure(case, backward, given.rounds)
        _print(name, record[name], kept)
    if given.json:
        facts = environment.device() | ({} if given.device == "cpu" else {"gpu": torch.cuda.get_device_name()})
        record = {"device": facts, "versions": environment.versions(), "commit": environment.commit(), **record}
        path = Path(__file__).parent / "results" / given.json.name
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Step time and state memory of the masked optimisers beside torch.optim with a mask multiplied into the gradient, in one run.

    python benchmarks/bench_optim.py [--json NAME.json]

Every density is gated first: active entries must follow torch's optimiser, others must keep their bits. Steps are timed in the middle of
training, both sides at the same step. Then the functions that rewrite parameters, beside the same in plain torch.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import environment
from harness import Contest, check_close, large_copy, outcome, seconds_of
from rewrite_contests import CONTESTS
from spread import spread, summary
from taskloom.optim import MaskedAdamW, MaskedSGD

# Weights of four layers of a transformer of width 768, and their biases.
SHAPES = ((2304, 768), (2304,), (768, 768), (768,), (3072, 768), (3072,), (768, 3072), (768,)) * 4
DENSITIES = (0.01, 0.1, 0.5)
OPTIONS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 1e-3, "weight_decay": 0.01},
    "SGD": {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.01},
}
OURS: dict[str, Any] = {"AdamW": MaskedAdamW, "SGD": MaskedSGD}
THEIRS: dict[str, Any] = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}


def _params() -> list[nn.Parameter]:
    made = [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(place))) for place, shape in enumerate(SHAPES)]
    for place, param in enumerate(made):
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(1000 + place))
    return made


def _masks(density: float) -> list[Tensor]:
    return [torch.rand(shape, generator=torch.Generator().manual_seed(2000 + place)) < density for place, shape in enumerate(SHAPES)]


def state_bytes(optimizer: torch.optim.Optimizer, masks: bool) -> int:
    """Bytes of the state tensors; of the masks in it only where asked for."""
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, Tensor) and name != "step" and (masks or name != "active")
    )


def gate_steps(kind: str, density: float) -> None:
    """Raise unless active entries follow torch and the others keep their bits."""
    ours, theirs, start, masks = _params(), _params(), _params(), _masks(density)
    own, other = OURS[kind](ours, masks, **OPTIONS[kind]), THEIRS[kind](theirs, foreach=True, **OPTIONS[kind])
    for _ in range(3):
        own.step()
        other.step()
    for param, expected, before, mask in zip(ours, theirs, start, masks, strict=True):
        torch.testing.assert_close(param[mask], expected[mask], rtol=1e-6, atol=1e-7)
        if not torch.equal(param[~mask], before[~mask]):
            raise AssertionError("entries that are not active changed")


def _masked_step(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], masks: list[Tensor]) -> Callable[[], None]:
    """Torch's way: the mask, in the parameters' dtype, multiplied into the gradients, then a step of everything."""
    factors = [mask.to(param.dtype) for mask, param in zip(masks, params, strict=True)]

    def step() -> None:
        torch._foreach_mul_([param.grad for param in params if param.grad is not None], factors)
        optimizer.step()

    return step


def measure_steps(kind: str, density: float, rounds: int) -> dict[str, Any]:
    """Step times, each after a large copy, of ours and of torch's in turn; the first step, which makes the state, is not counted."""
    masks = _masks(density)
    copy = large_copy()
    params = {name: _params() for name in ("ours", "foreach", "fused")}
    ours = OURS[kind](params["ours"], masks, **OPTIONS[kind])
    theirs = {name: THEIRS[kind](params[name], **{name: True}, **OPTIONS[kind]) for name in ("foreach", "fused")}
    calls: dict[str, Callable[[], Any]] = {"ours": ours.step}
    calls |= {name: _masked_step(optimizer, params[name], masks) for name, optimizer in theirs.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            copy()
            times[name].append(seconds_of(call))
    dense = state_bytes(theirs["fused"], masks=True)
    return {
        "optimizer": kind,
        "density": density,
        "seconds": {name: summary(taken) for name, taken in times.items()},
        "over_ours": {
            name: summary([theirs / own for theirs, own in zip(times[name], times["ours"], strict=True)]) for name in ("foreach", "fused")
        },
        "moments_share": state_bytes(ours, masks=False) / dense,
        "state_share": state_bytes(ours, masks=True) / dense,
    }


def gate_rewrite(contest: Contest) -> None:
    """Raise unless plain torch gives the same, where it draws no random numbers of its own."""
    if contest.shared is not None:
        for peer in contest.peers.values():
            check_close(outcome(contest, contest.ours), outcome(contest, peer), contest.exact)


def measure_rewrite(name: str, contest: Contest, rounds: int) -> dict[str, Any]:
    """Times of a function and of plain torch in turn, each after a large copy and from the same state."""
    copy = large_copy()
    calls = {"ours": contest.ours, **contest.peers}
    changed = [*([] if contest.changes is None else [contest.changes]), *contest.state]
    start = [tensor.clone() for tensor in changed]
    times: dict[str, list[float]] = {each: [] for each in calls}
    for _ in range(rounds):
        for each, call in calls.items():
            for tensor, old in zip(changed, start, strict=True):
                tensor.copy_(old)
            copy()
            times[each].append(seconds_of(call))
    over = {each: summary([theirs / own for theirs, own in zip(times[each], times["ours"], strict=True)]) for each in contest.peers}
    seconds = {each: summary(taken) for each, taken in times.items()}
    return {"function": name, "bytes": contest.bytes, "sizes": dict(contest.sizes), "seconds": seconds, "over_ours": over}


def _ratios(over: dict[str, Any]) -> str:
    return ", ".join(f"{name} / ours {spread(ratio, 1)}" for name, ratio in over.items())


def main() -> None:
    parser = argparse.ArgumentParser(description="Step time and state memory of the masked optimisers beside torch.optim.")
    parser.add_argument("--json", type=Path, help="file to keep the figures in, under benchmarks/results")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    found, rewrites = [], []
    for kind, density in itertools.product(OURS, DENSITIES):
        gate_steps(kind, density)
        one = measure_steps(kind, density, given.rounds)
        found.append(one)
        print(
            f"{kind}, density {density}: step {1e3 * one['seconds']['ours']['median']:.1f} ms; {_ratios(one['over_ours'])}; "
            f"state {one['moments_share']:.3f} of the dense one, {one['state_share']:.3f} with masks",
            flush=True,
        )
    for name, make in CONTESTS.items():
        contest = make()
        gate_rewrite(contest)
        one = measure_rewrite(name, contest, given.rounds)
        rewrites.append(one)
        print(f"{name}: {1e3 * one['seconds']['ours']['median']:.1f} ms; {_ratios(one['over_ours'])}", flush=True)
    if given.json:
        entries = sum(torch.Size(shape).numel() for shape in SHAPES)
        facts = {"device": environment.device(), "versions": environment.versions(), "threads": torch.get_num_threads()}
        whole = {**facts, **environment.commit(), "entries": entries, "densities": found, "rewrites": rewrites}
        (Path(__file__).parent / "results" / given.json.name).write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()

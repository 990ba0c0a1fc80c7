"""Time and peak memory of merge_breadcrumbs beside plain torch: its ranks by a sort, by topk and by kthvalue.

    python benchmarks/bench_breadcrumbs.py [--json NAME.json] [--device cuda] [--dtype bfloat16]

Ours is gated first: it must be the merge by a stable sort, to the bit. The others must be near it in float32; in 16 bits so many magnitudes
tie that their masks, which break ties as they please, are masks of their own. Arms take turns, and ratios are taken round by round. Peak
memory on the CPU is measured in a fresh process for each arm: the most that was resident during a call, above what was resident before it;
on a GPU by torch's own count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import environment
from harness import check_close, seconds_of
from inputs import checkpoints, total_bytes
from peaks import allocated_rise, resident_rise
from spread import spread, summary
from taskloom.methods.merging.breadcrumbs import merge_breadcrumbs

OURS = "merge_breadcrumbs"
WEIGHT, DENSITY, GAMMA = 0.3, 0.15, 0.01
# Relative, of changes that differ in what ties decide.
NEAR = 0.01
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Models = tuple[Tensor, list[Tensor]]
Mask = Callable[[Tensor], Tensor]


def _ranks(numel: int) -> tuple[int, int]:
    return int(GAMMA * numel), int(GAMMA * numel) + int(DENSITY * numel)


def _mask_of(places: Tensor, numel: int) -> Tensor:
    return torch.zeros(numel, dtype=torch.bool, device=places.device).index_fill_(0, places, True)


def mask_by_argsort(magnitudes: Tensor) -> Tensor:
    begin, end = _ranks(len(magnitudes))
    return _mask_of(magnitudes.argsort(descending=True)[begin:end], len(magnitudes))


def mask_by_stable_sort(magnitudes: Tensor) -> Tensor:
    begin, end = _ranks(len(magnitudes))
    return _mask_of(magnitudes.argsort(descending=True, stable=True)[begin:end], len(magnitudes))


def mask_by_topk(magnitudes: Tensor) -> Tensor:
    begin, end = _ranks(len(magnitudes))
    return _mask_of(magnitudes.topk(end).indices[begin:], len(magnitudes))


def mask_by_kthvalue(magnitudes: Tensor) -> Tensor:
    """Keeps what equals a bound too, as other implementations do: with ties more than asked for."""
    begin, end = _ranks(len(magnitudes))
    numel = len(magnitudes)
    high, low = magnitudes.kthvalue(numel - begin).values, magnitudes.kthvalue(numel - end + 1).values
    return (magnitudes >= low) & (magnitudes <= high)


def merged_with(mask: Mask, models: Models) -> Tensor:
    """The merge in plain torch, one model after the other."""
    base, tuned = models
    origin = base.float()
    total = torch.zeros_like(origin)
    for task in tuned:
        delta = task.float() - origin
        total += WEIGHT * torch.where(mask(delta.abs().flatten()).view_as(delta), delta, 0)
    return (origin + total).to(base.dtype)


def merged_by_us(models: Models) -> Tensor:
    base, tuned = models
    merged = merge_breadcrumbs({"w": base}, [{"w": task} for task in tuned], weight=WEIGHT, density=DENSITY, gamma=GAMMA)
    return merged["w"]


MASKS: dict[str, Mask] = {"argsort": mask_by_argsort, "topk": mask_by_topk, "kthvalue": mask_by_kthvalue}
ARMS: dict[str, Callable[[Models], Tensor]] = {
    OURS: merged_by_us,
    **{name: (lambda models, mask=mask: merged_with(mask, models)) for name, mask in MASKS.items()},
}


def call(arm: str, models: Models) -> Callable[[], Tensor]:
    """A merge that is finished when it returns."""

    def finished() -> Tensor:
        result = ARMS[arm](models)
        if result.is_cuda:
            torch.cuda.synchronize()
        return result

    return finished


def gate(models: Models) -> None:
    """Raise unless ours is the merge of a stable sort, and in float32 the others change the base nearly as it does."""
    base, _ = models
    expected = merged_with(mask_by_stable_sort, models)
    check_close(ARMS[OURS](models), expected, exact=True)
    for mask in MASKS.values() if base.dtype == torch.float32 else ():
        check_close(merged_with(mask, models) - base, expected - base, tolerance=NEAR)


def make(given: argparse.Namespace) -> Models:
    base, tuned = checkpoints((given.size // 1024, 1024), getattr(torch, given.dtype), given.models)
    return base.to(given.device), [task.to(given.device) for task in tuned]


def times(models: Models, rounds: int) -> dict[str, Any]:
    """Seconds of each arm, in turn, and the ratios round by round."""
    calls = {arm: call(arm, models) for arm in ARMS}
    calls[OURS]()
    taken: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for number in range(rounds):
        for arm in list(ARMS) if number % 2 == 0 else list(ARMS)[::-1]:
            taken[arm].append(seconds_of(calls[arm]))
    least = total_bytes(models[0], *models[1], models[0])
    return {
        "seconds": {arm: summary(seconds) for arm, seconds in taken.items()},
        "over_ours": {
            arm: summary([theirs / own for theirs, own in zip(seconds, taken[OURS], strict=True)])
            for arm, seconds in taken.items()
            if arm != OURS
        },
        "bytes": least,
        "gigabytes_per_second": summary([least / own / 1e9 for own in taken[OURS]]),
    }


def peak_elsewhere(arm: str, given: argparse.Namespace) -> int:
    """Peak resident memory of an arm in a fresh process."""
    sizes = [f"--{name}={getattr(given, name)}" for name in ("size", "models", "dtype")]
    command = [sys.executable, __file__, "--only", arm, *sizes]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def _print(found: dict[str, Any]) -> None:
    for arm, seconds in found["seconds"].items():
        ratio = "" if arm == OURS else f"; {spread(found['over_ours'][arm])} of ours"
        print(f"{arm:<20}{1e3 * seconds['median']:9.1f} ms, peak {found['peak_bytes'][arm] / 1e6:8.1f} MB{ratio}", flush=True)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Gate, times and memory."""
    models = make(given)
    gate(models)
    found = times(models, given.rounds)
    found["peak_bytes"] = {arm: peak_elsewhere(arm, given) if given.device == "cpu" else allocated_rise(call(arm, models)) for arm in ARMS}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and peak memory of merge_breadcrumbs beside plain torch.")
    parser.add_argument("--json", type=Path, help="file to keep the figures in, under benchmarks/results")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=[str(dtype).removeprefix("torch.") for dtype in DTYPES])
    parser.add_argument("--size", type=int, default=1 << 22, help="entries of the tensor, a multiple of 1024")
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(resident_rise(call(given.only, make(given))))
        return
    found = measure(given)
    _print(found)
    if given.json:
        sizes = {name: getattr(given, name) for name in ("size", "models", "dtype", "rounds")}
        settings = {"weight": WEIGHT, "density": DENSITY, "gamma": GAMMA}
        device = environment.device() | ({} if given.device == "cpu" else {"gpu": torch.cuda.get_device_name()})
        facts = {"device": device, "versions": environment.versions(), "threads": torch.get_num_threads()}
        whole = {**facts, **environment.commit(), **sizes, **settings, **found}
        (Path(__file__).parent / "results" / given.json.name).write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Time and peak memory of weighted_ce beside cross-entropy on logits, forward alone and with backward, in one run.

    python benchmarks/bench_weighted_ce.py [--json NAME.json] [--device cuda] [--dtype bfloat16]

Every arm is gated first: its loss and gradients must be those of float64 logits. Peak memory on the CPU is measured in a fresh process for
each arm: the most that was resident during a call, above what was resident before it; on a GPU by torch's own count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import environment
from arms_weighted_ce import ARMS, GRADIENTS_IN_FORWARD, OURS, Batch, batch, obstacle
from harness import seconds_of
from peaks import allocated_rise, resident_rise
from spread import spread, summary

SHARES = (1.0, 0.1, 0.01)
PASSES = ("forward", "both")
# Of the loss and of the gradients, relative: torch rounds the logits of 16-bit hidden states to 16 bits.
TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 2e-2), torch.float16: (1e-2, 1e-2)}


def call(arm: str, given: Batch, which: str) -> Callable[[], Any]:
    """One pass of an arm: ``forward`` without gradients, or ``both`` with those of hidden states and head."""
    function = ARMS[arm]

    def forward() -> Any:
        with torch.no_grad():
            return function(given)

    def both() -> Any:
        return torch.autograd.grad(function(given), (given.hidden, given.head))

    run = forward if which == "forward" else both

    def finished() -> Any:
        result = run()
        if given.hidden.is_cuda:
            torch.cuda.synchronize()
        return result

    return finished


def gate(arms: list[str], given: Batch) -> None:
    """Raise unless every arm gives the loss and the gradients of float64 logits."""
    wide = Batch(*(tensor.detach().double().requires_grad_() for tensor in (given.hidden, given.head)), given.targets, given.weights)
    rows = wide.weights.nonzero()[:, 0]
    loss = torch.nn.functional.cross_entropy(wide.hidden[rows] @ wide.head.t(), wide.targets[rows])
    expected = [loss.detach(), *torch.autograd.grad(loss, (wide.hidden, wide.head))]
    for arm in arms:
        alone = call(arm, given, "forward")() if arm not in GRADIENTS_IN_FORWARD else loss.detach()
        got = [alone, *call(arm, given, "both")()]
        for name, one, other in zip(("loss", "hidden gradient", "head gradient"), got, expected, strict=True):
            error = float(torch.linalg.vector_norm(one.double() - other) / torch.linalg.vector_norm(other))
            most = TOLERANCES[given.hidden.dtype][name != "loss"]
            if not error <= most:
                raise AssertionError(f"{arm}: {name}: relative error {error:.1e}, expected at most {most}")


def product(given: Batch) -> Callable[[], Any]:
    """The matrix product that makes the logits of supervised rows, into memory that is there: what a pass's products are measured by."""
    rows = given.hidden.detach()[given.weights.nonzero()[:, 0]]
    head = given.head.detach()
    out = torch.empty(len(rows), len(head), dtype=rows.dtype, device=rows.device)

    def multiply() -> None:
        torch.mm(rows, head.t(), out=out)
        if out.is_cuda:
            torch.cuda.synchronize()

    return multiply


def _over_ours(taken: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """How many times as long as ours each other arm took, round by round."""
    return {
        arm: summary([theirs / own for theirs, own in zip(seconds, taken[OURS], strict=True)])
        for arm, seconds in taken.items()
        if arm != OURS
    }


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Wall seconds, and processor seconds of all threads, which say more where a machine is shared."""
    processor = time.process_time()
    wall = seconds_of(run)
    return wall, time.process_time() - processor


def times(arms: list[str], given: Batch, which: str, rounds: int) -> dict[str, Any]:
    """Seconds of each arm and of the product, in turn, and the ratios round by round."""
    calls = {arm: call(arm, given, which) for arm in arms}
    multiply = product(given)
    taken: dict[str, list[float]] = {arm: [] for arm in arms}
    processor: dict[str, list[float]] = {arm: [] for arm in arms}
    products = []
    # The gate has warmed up everything else.
    multiply()
    for number in range(rounds):
        order = arms if number % 2 == 0 else arms[::-1]
        for arm in order:
            wall, cpu = timed(calls[arm])
            taken[arm].append(wall)
            processor[arm].append(cpu)
        products.append(seconds_of(multiply))
    # Forward has to multiply once; with backward, three times.
    least = 1 if which == "forward" else 3
    return {
        "seconds": {arm: summary(seconds) for arm, seconds in taken.items()},
        "cpu_seconds": {arm: summary(seconds) for arm, seconds in processor.items()},
        "over_ours": _over_ours(taken),
        "cpu_over_ours": _over_ours(processor),
        "product_seconds": summary(products),
        "share_of_products": summary([least * one / own for one, own in zip(products, taken[OURS], strict=True)]),
    }


def peak_here(run: Callable[[], Any], compiles: bool) -> int:
    """Bytes that a call had resident at most, above what was there before it."""
    if compiles:
        run()
    return resident_rise(run)


def peak_on_gpu(run: Callable[[], Any]) -> int:
    run()
    return allocated_rise(run)


def peak_elsewhere(arm: str, share: float, which: str, given: argparse.Namespace) -> int:
    """The same in a fresh process."""
    sizes = [f"--{name}={getattr(given, name)}" for name in ("rows", "width", "vocabulary", "dtype")]
    command = [sys.executable, __file__, "--only", arm, "--share", str(share), "--pass", which, *sizes]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def make(given: argparse.Namespace, share: float) -> Batch:
    return batch(given.rows, given.width, given.vocabulary, share, getattr(torch, given.dtype), given.device)


def measure(given: argparse.Namespace, share: float) -> dict[str, Any]:
    """Gate, times and memory of one share of supervised rows."""
    arms = [arm for arm in ARMS if obstacle(arm, given.device) is None]
    data = make(given, share)
    gate(arms, data)
    found: dict[str, Any] = {"share": share, "supervised": data.supervised}
    for which in PASSES:
        there = [arm for arm in arms if which == "both" or arm not in GRADIENTS_IN_FORWARD]
        found[which] = times(there, data, which, given.rounds)
        on_gpu = given.device != "cpu"
        found[which]["peak_bytes"] = {
            arm: peak_on_gpu(call(arm, data, which)) if on_gpu else peak_elsewhere(arm, share, which, given) for arm in there
        }
        _print(found, which)
    return found


def _print(found: dict[str, Any], which: str) -> None:
    one = found[which]
    print(f"share {found['share']} ({found['supervised']} rows), {which}: {spread(one['share_of_products'])} of its products' speed")
    for arm, seconds in one["seconds"].items():
        ratio = "" if arm == OURS else f"; {spread(one['over_ours'][arm])} of ours, processor time {spread(one['cpu_over_ours'][arm])}"
        print(f"  {arm:<22}{1e3 * seconds['median']:9.1f} ms, peak {one['peak_bytes'][arm] / 1e6:8.1f} MB{ratio}", flush=True)


def _device(given: argparse.Namespace) -> dict[str, Any]:
    facts = environment.device()
    return facts if given.device == "cpu" else facts | {"gpu": torch.cuda.get_device_name()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and peak memory of weighted_ce beside cross-entropy on logits.")
    parser.add_argument("--json", type=Path, help="file to keep the figures in, under benchmarks/results")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=[str(dtype).removeprefix("torch.") for dtype in TOLERANCES])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32016)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--pass", dest="which", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(peak_here(call(given.only, make(given, given.share), given.which), compiles="compiled" in given.only))
        return
    shares = [measure(given, share) for share in SHARES]
    left_out = {arm: why for arm in ARMS if (why := obstacle(arm, given.device)) is not None}
    for arm, why in left_out.items():
        print(f"{arm} did not run: {why}")
    if given.json:
        sizes = {name: getattr(given, name) for name in ("rows", "width", "vocabulary", "dtype", "rounds")}
        facts = {"device": _device(given), "versions": environment.versions(), "threads": torch.get_num_threads()}
        whole = {**facts, **environment.commit(), **sizes, "shares": shares, "did_not_run": left_out}
        (Path(__file__).parent / "results" / given.json.name).write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()

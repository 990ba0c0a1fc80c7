"""Time and memory of aTLAS's composition of task vectors on the CPU: `block_scale_merge` beside what people write in torch.

python benchmarks/bench_atlas_composition.py --json benchmarks/results/atlas-composition-NAME.json

Three passes: the composition alone, the gradient of the coefficients alone (given the composed blocks' gradients), and both, which is what
a training step adds to the network's own work. Forms follow each other in every round, each after a large copy, and are compared with ours
round by round. Every form is checked against ours first, and ours against its reference. Compilation is not in the time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config

import environment
import taskloom
from allocated import peak_allocated
from arms_atlas import OURS, Arm, Pool, arms, vision_transformer
from harness import COPY_BYTES, check_close, large_copy, seconds_of
from spread import summary
from taskloom.ops.masked import block_scale_merge_backward

# Vectors, their dtype, groups of each block, and whether the blocks are many small ones instead of a vision transformer's.
CASES = {
    "8 float16": (8, torch.float16, 1, False),
    "21 float16": (21, torch.float16, 1, False),
    "8 float32": (8, torch.float32, 1, False),
    "8 float16, 10 groups": (8, torch.float16, 10, False),
    "8 float16, 200 small blocks": (8, torch.float16, 1, True),
}
PASSES = ("forward", "backward", "both")
SMALL = [(32, 32)] * 200


def passes(arm: Arm, pool: Pool) -> dict[str, Callable[[], Any]]:
    """What is measured of one arm, by the pass's name."""

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return arm.compose(pool.coef)

    if not arm.differentiable:
        return {"forward": forward}
    leaf = pool.coef.clone().requires_grad_()
    graph = arm.compose(leaf)

    def backward() -> Tensor:
        return torch.autograd.grad(graph, leaf, pool.gradients, retain_graph=True)[0]

    def both() -> Tensor:
        return torch.autograd.grad(arm.compose(leaf), leaf, pool.gradients)[0]

    return {"forward": forward, "backward": backward, "both": both}


def gate(found: dict[str, Arm], calls: dict[str, dict[str, Callable[[], Any]]], pool: Pool) -> None:
    """Raise unless ours is its reference and all others are near it, forward and backward."""
    composed, gradient = calls[OURS]["forward"](), calls[OURS]["both"]()
    with taskloom.backend("reference"):
        check_close(composed, calls[OURS]["forward"](), exact=True)
        # Summed in float64: what autograd makes of the reference's forward sums in float32.
        groups = pool.coef.shape[2] if pool.coef.dim() == 3 else 1
        products = block_scale_merge_backward(pool.gradients, pool.deltas, pool.partition or (), groups)
        check_close(gradient, products.view(gradient.shape).to(gradient.dtype), tolerance=1e-6)
    for name, arm in found.items():
        check_close(calls[name]["forward"](), composed, tolerance=arm.tolerance)
        if arm.differentiable:
            check_close(calls[name]["both"](), gradient, tolerance=arm.gradient_tolerance)
            check_close(calls[name]["backward"](), gradient, tolerance=arm.gradient_tolerance)


def _figures(taken: list[float], processor: list[float], ours: list[float], copies: list[float], moved: int) -> dict[str, Any]:
    return {
        "seconds": summary(taken),
        "processor_seconds": summary(processor),
        "over_ours": summary([theirs / own for theirs, own in zip(taken, ours, strict=True)]),
        "share_of_copy": summary([moved / one / (2 * COPY_BYTES / copy) for one, copy in zip(taken, copies, strict=True)]),
    }


def measure(case: str, width: int, layers: int, rounds: int, compiled: bool) -> dict[str, Any]:
    """Seconds of every arm and pass, their ratio to ours in the same round, and the memory that each takes."""
    tasks, dtype, groups, small = CASES[case]
    pool = Pool.make(SMALL if small else vision_transformer(width, layers), tasks, dtype, groups)
    found = arms(pool, compiled)
    calls = {name: passes(arm, pool) for name, arm in found.items()}
    gate(found, calls, pool)
    copy = large_copy()
    row: dict[str, Any] = {
        "case": case,
        "blocks": len(pool.base),
        "parameters": sum(one.numel() for one in pool.base),
        "bytes": {"forward": pool.forward_bytes, "backward": pool.backward_bytes},
        "kept": {name: arm.kept for name, arm in found.items()},
        "peak": {name: {which: peak_allocated(call) for which, call in calls[name].items()} for name in found},
    }
    for which in PASSES:
        moved = sum(row["bytes"].values()) if which == "both" else row["bytes"][which]
        names = [name for name in found if which in calls[name]]
        taken: dict[str, list[float]] = {name: [] for name in names}
        processor: dict[str, list[float]] = {name: [] for name in names}
        copies = []
        for place in range(rounds + 1):
            seconds = {}
            for name in names:
                copied = seconds_of(copy)
                before = time.process_time()
                seconds[name] = seconds_of(calls[name][which])
                if place > 0:
                    taken[name].append(seconds[name])
                    processor[name].append(time.process_time() - before)
            if place > 0:
                copies.append(copied)
        row[which] = {name: _figures(taken[name], processor[name], taken[OURS], copies, moved) for name in names}
        row["copy_gigabytes_per_second"] = summary([2 * COPY_BYTES / one / 1e9 for one in copies])
    return row


def report(row: dict[str, Any]) -> None:
    """Print a case's figures."""
    print(f"{row['case']}: {row['blocks']} blocks, {row['parameters'] / 1e6:.1f} M parameters")
    for which in PASSES:
        for name, one in row[which].items():
            ratio, peak = one["over_ours"], row["peak"][name][which] + row["kept"][name]
            wall, processor = 1e3 * one["seconds"]["median"], 1e3 * one["processor_seconds"]["median"]
            print(
                f"  {which:9}{name:18}{wall:9.2f} ms  processor {processor:9.2f} ms"
                f"  {ratio['median']:6.2f} x ({ratio['lowest']:.2f}-{ratio['highest']:.2f})"
                f"  {100 * one['share_of_copy']['median']:4.0f} % of a copy  {peak / 2**20:8.1f} MiB",
                flush=True,
            )


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--width", type=int, default=384, help="of the vision transformer; 768 is ViT-B/32")
    parser.add_argument("--layers", type=int, default=12, help="of the vision transformer")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes minutes with many layers and vectors")
    options = parser.parse_args()
    # The backward that is measured alone is run more than once on one graph.
    functorch_config.donated_buffer = False
    surroundings = {
        "device": environment.device(),
        "versions": environment.versions(),
        "threads": torch.get_num_threads(),
        "width": options.width,
        "layers": options.layers,
        **environment.commit(),
    }
    rows = []
    for case in options.cases:
        row = measure(case, options.width, options.layers, options.rounds, not options.no_compile)
        rows.append(row)
        report(row)
        torch.compiler.reset()
        if options.json:
            options.json.write_text(json.dumps(surroundings | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

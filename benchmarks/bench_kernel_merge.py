"""Time and peak memory of SNELLA's merge of a layer, forward and with backward: ours beside the official eager form.

python benchmarks/bench_kernel_merge.py --json benchmarks/results/kernel-merge-NAME.json

Times are taken in one process, form after form in every round: wall seconds, and those of the processor beside them, which other programs
on the machine change less. Memory is that of a process of its own for each form: the rise of its
peak resident size over what it held before the call, inputs included there.
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
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import environment
import kernel_forms
import taskloom
from inputs import weights
from peaks import resident_rise
from spread import summary

SIZES = ((768, 768), (3072, 768), (1024, 4096), (4096, 1024), (4096, 4096))
FORMS = ("ours", "eager", "checkpoint", "compiled")
CHUNKS, WIDTH, SPARSITY = 2, 16, 0.9

Forward = Callable[[list[Tensor], Tensor], Tensor]


def forward_of(form: str) -> Forward:
    """The merged matrix from [A, B, coef, alpha, gamma, beta] and a base."""

    def official(leaves: list[Tensor], base: Tensor) -> Tensor:
        return kernel_forms.merged(base, leaves[0], leaves[1], leaves[2], (leaves[3], leaves[4], leaves[5]), SPARSITY)

    if form == "ours":
        return lambda leaves, base: taskloom.kernel_merge(
            *leaves[:3], alpha=leaves[3], gamma=leaves[4], beta=leaves[5], sparsity=SPARSITY, base=base
        )
    if form == "checkpoint":
        return lambda leaves, base: checkpoint(official, leaves, base, use_reentrant=False)
    return torch.compile(official) if form == "compiled" else official


class Case:
    """One size with its inputs."""

    def __init__(self, m: int, n: int) -> None:
        factors = (0.1 * weights((CHUNKS, n, WIDTH), 1), 0.1 * weights((CHUNKS, m, WIDTH), 2), torch.tensor([0.1, -0.1]))
        numbers = (torch.tensor(1.0), torch.tensor(1.0), torch.tensor(0.0))
        self.leaves = [one.requires_grad_() for one in (*factors, *numbers)]
        self.base, self.upstream = weights((m, n), 3), weights((m, n), 4)

    def forward(self, form: Forward) -> Tensor:
        with torch.no_grad():
            return form(self.leaves, self.base)

    def both(self, form: Forward) -> tuple[Tensor, ...]:
        return torch.autograd.grad(form(self.leaves, self.base), self.leaves, self.upstream)


def check(case: Case, form: Forward) -> None:
    """Raise unless our merge and gradients are those of another form."""
    ours = forward_of("ours")
    for got, expected, allowed in (
        (case.forward(ours) - case.base, case.forward(form) - case.base, 1e-3),
        *((mine, theirs, 1e-3) for mine, theirs in zip(case.both(ours), case.both(form), strict=True)),
    ):
        error = torch.linalg.vector_norm(got.double() - expected.double()) / torch.linalg.vector_norm(expected.double())
        if not error <= allowed:
            raise AssertionError(f"relative error {float(error):.1e}, expected at most {allowed}")


def peak_rise(form: str, m: int, n: int, call: str) -> int:
    """Bytes by which a call raises the resident size of this process at its peak."""
    case, run = Case(m, n), forward_of(form)
    # What a first call loads is not the merge's.
    getattr(Case(96, 64), call)(run)
    return resident_rise(lambda: getattr(case, call)(run))


def measured_rise(form: str, m: int, n: int, call: str) -> int:
    command = [sys.executable, __file__, "--rise", form, str(m), str(n), call]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure(m: int, n: int, forms: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """Seconds and bytes of every form."""
    case = Case(m, n)
    runs = {form: forward_of(form) for form in forms}
    check(case, forward_of("eager"))
    found: dict[str, Any] = {"outputs": m, "inputs": n, "quantile": "torch" if m * n <= kernel_forms.QUANTILE_TAKES else "kthvalue"}
    for call in ("forward", "both"):
        taken: dict[str, list[float]] = {form: [] for form in forms}
        worked: dict[str, list[float]] = {form: [] for form in forms}
        for place in range(rounds + 1):
            for form, run in runs.items():
                begin, processor = time.perf_counter(), time.process_time()
                getattr(case, call)(run)
                if place:
                    taken[form].append(time.perf_counter() - begin)
                    worked[form].append(time.process_time() - processor)
        found[call] = {}
        for form in forms:
            rise = measured_rise(form, m, n, call)
            found[call][form] = {
                "seconds": summary(taken[form]),
                "over_ours": summary([theirs / own for theirs, own in zip(taken[form], taken["ours"], strict=True)]),
                "processor_seconds": summary(worked[form]),
                "processor_over_ours": summary([theirs / own for theirs, own in zip(worked[form], worked["ours"], strict=True)]),
                "peak_bytes": rise,
                "peak_weights": round(rise / (4 * m * n), 2),
            }
    return found


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--sizes", nargs="+", default=[f"{m}x{n}" for m, n in SIZES])
    parser.add_argument("--rise", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rise:
        form, m, n, call = options.rise
        print(peak_rise(form, int(m), int(n), call))
        return
    surroundings = {
        "device": environment.device(),
        "versions": environment.versions(),
        "threads": torch.get_num_threads(),
        **environment.commit(),
    }
    rows = []
    for size in options.sizes:
        m, n = map(int, size.split("x"))
        row = measure(m, n, tuple(dict.fromkeys(("ours", *options.forms))), options.rounds)
        rows.append(row)
        for call in ("forward", "both"):
            for form, one in row[call].items():
                wall, ratio, work = (one[key]["median"] for key in ("seconds", "over_ours", "processor_over_ours"))
                times = f"{1e3 * wall:9.1f} ms {ratio:6.1f} x ({work:.1f} x of processor time)"
                print(f"{size:>10} {call:8}{form:11}{times}  peak {one['peak_weights']:5.2f} weights", flush=True)
        if options.json:
            found = surroundings | {"rank": CHUNKS * WIDTH, "sparsity": SPARSITY, "rows": rows}
            options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

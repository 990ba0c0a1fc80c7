"""lowrank_merge_ of several adapters into a 16-bit weight, beside the merge of PEFT's own layer: time and peak memory.

    python benchmarks/bench_peft_merge.py [--json benchmarks/results/peft-merge-NAME.json]

PEFT's arm needs peft beside taskloom; without it the benchmark says so. Every arm's result is compared with float64 first. Arms take turns
in one process, each on the weight as it was before; memory is the rise of the peak resident size in a process of its own for each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

import environment
import taskloom
from inputs import weights
from optional import obstacle, optional, optional_versions
from peaks import resident_rise
from spread import spread, summary

ARMS = ("ours", "peft", "addmm_")
# PEFT makes adapters of 16-bit models float32 unless it is told not to.
DTYPES = ("bfloat16", "float32")
ALPHA = 32
# The most roundings to bfloat16 that an entry may have gone through: ours has one, the others one for each adapter, PEFT's deltas too.
_ROUNDING = 2**-8


class Case:
    """A bfloat16 weight and adapters of a rank, ours and PEFT's of the same values."""

    def __init__(self, size: int, rank: int, adapters: int, dtype: torch.dtype) -> None:
        self.scale = ALPHA / rank
        self.base = weights((size, size), 0, torch.bfloat16)
        self.names = [f"adapter{place}" for place in range(adapters)]
        # Such that the sum of the products has about a tenth of the weight's size.
        self.A = [(0.1 / self.scale / (rank * adapters) ** 0.5 * weights((rank, size), 10 + place)).to(dtype) for place in range(adapters)]
        self.B = [weights((size, rank), 50 + place, dtype) for place in range(adapters)]
        self.target = self.base.clone()
        peft = optional("peft")
        self.layer: Any = None if peft is None else self._layer(peft)

    def _layer(self, peft: ModuleType) -> nn.Module:
        """PEFT's layer around the weight, with the same adapters."""
        rows, columns = self.target.shape
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        linear.weight = nn.Parameter(self.target, requires_grad=False)
        config = peft.LoraConfig(r=self.A[0].shape[0], lora_alpha=ALPHA, target_modules=["linear"])
        wide = self.A[0].dtype == torch.float32
        holder = nn.ModuleDict({"linear": linear})
        model = peft.get_peft_model(holder, config, adapter_name=self.names[0], autocast_adapter_dtype=wide)
        for name in self.names[1:]:
            model.add_adapter(name, config, autocast_adapter_dtype=wide)
        layer: Any = holder["linear"]
        with torch.no_grad():
            for name, a, b in zip(self.names, self.A, self.B, strict=True):
                for own, values in ((layer.lora_A[name].weight, a), (layer.lora_B[name].weight, b)):
                    assert own.dtype == values.dtype
                    own.copy_(values)
        assert layer.base_layer.weight.data_ptr() == self.target.data_ptr()
        return layer

    def restore(self) -> None:
        """The weight as it was before merges."""
        self.target.copy_(self.base)
        if self.layer is not None:
            self.layer.merged_adapters.clear()

    def run(self, arm: str) -> None:
        """Merge all adapters into the weight."""
        if arm == "ours":
            taskloom.lowrank_merge_(self.target, self.A, self.B, scale=self.scale)
        elif arm == "peft":
            self.layer.merge(adapter_names=self.names)
        else:
            for a, b in zip(self.A, self.B, strict=True):
                self.target.addmm_(b, a, alpha=self.scale)

    def arms(self) -> list[str]:
        """What can run: PEFT where it is installed, torch.addmm_ where all have one dtype."""
        there = {"ours": True, "peft": self.layer is not None, "addmm_": self.A[0].dtype == self.base.dtype}
        return [arm for arm in ARMS if there[arm]]


def gate(case: Case, arm: str) -> float:
    """Raise unless an arm gives the merge of float64 up to its roundings; the relative error."""
    products = sum(b.double() @ a.double() for a, b in zip(case.A, case.B, strict=True))
    expected = case.base.double() + case.scale * products
    case.restore()
    case.run(arm)
    error = float(torch.linalg.vector_norm(case.target.double() - expected) / torch.linalg.vector_norm(expected))
    case.restore()
    most = _ROUNDING * (1 if arm == "ours" else 2 * len(case.names))
    if not error <= most:
        raise AssertionError(f"{arm}: relative error {error:.1e}, expected at most {most:.1e}")
    return error


def peak(arm: str, options: argparse.Namespace) -> int:
    """Bytes by which a merge raises the resident size of this process at its peak."""
    dtype = getattr(torch, options.dtypes[0])
    # What a first call loads is not the merge's.
    Case(64, options.rank, options.adapters, dtype).run(arm)
    case = Case(options.size, options.rank, options.adapters, dtype)
    return resident_rise(lambda: case.run(arm))


def measured_peak(arm: str, dtype: str, options: argparse.Namespace) -> int:
    given = [f"--{name}={getattr(options, name)}" for name in ("size", "rank", "adapters")]
    command = [sys.executable, __file__, "--only", arm, "--dtypes", dtype, *given]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure(dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Errors, seconds and bytes of every arm for adapters of a dtype."""
    case = Case(options.size, options.rank, options.adapters, getattr(torch, dtype))
    arms = case.arms()
    errors = {arm: gate(case, arm) for arm in arms}
    taken: dict[str, list[float]] = {arm: [] for arm in arms}
    worked: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(options.rounds):
        for arm in arms:
            case.restore()
            begin, processor = time.perf_counter(), time.process_time()
            case.run(arm)
            taken[arm].append(time.perf_counter() - begin)
            worked[arm].append(time.process_time() - processor)
    found: dict[str, Any] = {"adapters_dtype": dtype, "arms": {}}
    for arm in arms:
        rise = measured_peak(arm, dtype, options)
        found["arms"][arm] = {
            "error": errors[arm],
            "seconds": summary(taken[arm]),
            "over_ours": summary([theirs / own for theirs, own in zip(taken[arm], taken["ours"], strict=True)]),
            "processor_seconds": summary(worked[arm]),
            "processor_over_ours": summary([theirs / own for theirs, own in zip(worked[arm], worked["ours"], strict=True)]),
            "peak_bytes": rise,
            "peak_weights": round(rise / case.base.nbytes, 3),
        }
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", type=int, default=4096)
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--adapters", type=int, default=4)
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES, help="of the adapters")
    made.add_argument("--json", type=Path)
    made.add_argument("--only", choices=ARMS, help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Measure, print and keep."""
    options = parser().parse_args()
    if options.only:
        print(peak(options.only, options))
        return
    missing = obstacle("peft")
    if missing:
        print(f"{missing}: its merge is left out; docs/lowrank.md has the command")
    rows = [measure(dtype, options) for dtype in dict.fromkeys(options.dtypes)]
    for row in rows:
        for arm, one in row["arms"].items():
            ratios = f"{spread(one['over_ours'], 1):>18} of ours, processor time {spread(one['processor_over_ours'], 1):>18}"
            milliseconds = spread({name: 1e3 * value for name, value in one["seconds"].items()}, 1)
            print(f"{row['adapters_dtype']:9} {arm:7} {milliseconds:>24} ms {ratios}, peak {one['peak_weights']:6.3f} weights")
    if options.json:
        surroundings = {
            "device": environment.device(),
            "versions": environment.versions() | optional_versions("peft"),
            "threads": torch.get_num_threads(),
            **environment.commit(),
            **{name: getattr(options, name) for name in ("size", "rank", "adapters")},
        }
        options.json.write_text(json.dumps(surroundings | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The masked family against torch eager: one row per op and use. A new op is a row at the end of ROWS.

python -m pytest benchmarks/bench_masked.py --benchmark-json=FILE
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import taskloom
from harness import Contest, Row

SIDE = 4096
TASKS = 3
DENSITY = 0.2
# Rows that the gate compares with the reference.
SLICE = 16

TIES: dict[str, Any] = {"select": "magnitude", "density": DENSITY, "elect": "sign_sum", "combine": "disjoint_mean"}
DARE: dict[str, Any] = {"select": "dropout", "density": DENSITY, "rescale": "density", "seed": 1}


def checkpoints(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(SIDE, SIDE, generator=generator)
    tuned = [(base + 0.01 * torch.randn(SIDE, SIDE, generator=generator)).to(dtype) for _ in range(TASKS)]
    return base.to(dtype), tuned


def same_as_reference(call: Callable[[], Any], tolerance: float) -> None:
    """Raise unless a call gives what it gives on the reference backend."""
    got = call()
    with taskloom.backend("reference"):
        expected = call()
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=0)


def threshold_contest(dtype: torch.dtype) -> Contest:
    base, (tuned, *_) = checkpoints(dtype)
    rank = int(DENSITY * base.numel())

    def magnitudes() -> Tensor:
        return (tuned.float() - base.float()).abs().flatten()

    return Contest(
        ours=lambda: taskloom.magnitude_threshold(tuned, base, rank=rank),
        gate=lambda: same_as_reference(lambda: taskloom.magnitude_threshold(tuned[:SLICE], base[:SLICE], density=DENSITY), 0),
        bytes=2 * base.nbytes,
        peers={
            "kthvalue": lambda: magnitudes().kthvalue(base.numel() - rank + 1),
            "topk": lambda: magnitudes().topk(rank, sorted=False).values.min(),
            "argsort": lambda: magnitudes().argsort(descending=True),
        },
    )


def merge_contest(eager: Callable[[Tensor, list[Tensor]], Tensor], passes: int, **stages: Any) -> Callable[[torch.dtype], Contest]:
    """A merge that must read its tensors ``passes`` times and write one."""

    def make(dtype: torch.dtype) -> Contest:
        base, tuned = checkpoints(dtype)
        out = torch.empty_like(base)
        few = [task[:SLICE] for task in tuned]
        return Contest(
            ours=lambda: taskloom.sparse_merge(base, tuned, 0.5, **stages, out=out),
            gate=lambda: same_as_reference(lambda: taskloom.sparse_merge(base[:SLICE], few, 0.5, **stages), 1e-6),
            bytes=(passes * (1 + TASKS) + 1) * base.nbytes,
            peers={"eager": lambda: eager(base, tuned)},
        )

    return make


def eager_sum(base: Tensor, tuned: list[Tensor]) -> Tensor:
    deltas = torch.stack([task.float() - base.float() for task in tuned])
    return (base.float() + (0.5 * deltas).sum(0)).to(base.dtype)


def eager_ties(base: Tensor, tuned: list[Tensor]) -> Tensor:
    deltas = torch.stack([task.float() - base.float() for task in tuned]).flatten(1)
    kept = torch.zeros_like(deltas, dtype=torch.bool)
    places = deltas.abs().topk(int(DENSITY * base.numel()), sorted=False).indices
    trimmed = torch.where(kept.scatter_(1, places, True), 0.5 * deltas, 0)
    sign = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agree = trimmed * sign > 0
    mean = torch.where(agree, trimmed, 0).sum(0) / (0.5 * agree.sum(0)).clamp(min=0.5)
    return (base.float() + mean.reshape(base.shape)).to(base.dtype)


def eager_dare(base: Tensor, tuned: list[Tensor]) -> Tensor:
    deltas = torch.stack([task.float() - base.float() for task in tuned])
    kept = torch.bernoulli(torch.full_like(deltas, DENSITY))
    return (base.float() + (0.5 * kept * deltas / DENSITY).sum(0)).to(base.dtype)


ROWS = (
    Row("magnitude_threshold", threshold_contest),
    Row("sparse_merge task arithmetic", merge_contest(eager_sum, 1)),
    Row("sparse_merge TIES", merge_contest(eager_ties, 2, **TIES)),
    Row("sparse_merge DARE", merge_contest(eager_dare, 1, **DARE)),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_speed(run_row: Callable[[Row, torch.dtype], None], row: Row, dtype: torch.dtype) -> None:
    run_row(row, dtype)

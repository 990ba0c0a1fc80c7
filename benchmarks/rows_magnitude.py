"""Rows of the ops that select by magnitude."""

from __future__ import annotations

import torch
from torch import Tensor

import taskloom
from harness import Contest, Row, Shape
from inputs import checkpoints, total_bytes

DENSITY = 0.2


def threshold_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    base, (tuned,) = checkpoints(shape, dtype, 1)
    rank = int(DENSITY * base.numel())

    def magnitudes() -> Tensor:
        return (tuned.float() - base.float()).abs().flatten()

    def by_argsort() -> Tensor:
        found = magnitudes()
        return found[found.argsort(descending=True)[rank - 1]]

    return Contest(
        ours=lambda: taskloom.magnitude_threshold(tuned, base, rank=rank),
        bytes=total_bytes(tuned, base),
        peers={
            "kthvalue": lambda: magnitudes().kthvalue(base.numel() - rank + 1).values,
            "topk": lambda: magnitudes().topk(rank, sorted=False).values.min(),
            "argsort": by_argsort,
        },
        shared=lambda found: found.threshold,
        exact=True,
        sizes={"rank": rank},
    )


def row_threshold_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    base, (tuned,) = checkpoints(shape, dtype, 1)
    rank = int(DENSITY * shape[1])

    def magnitudes() -> Tensor:
        return (tuned.float() - base.float()).abs()

    return Contest(
        ours=lambda: taskloom.magnitude_threshold(tuned, base, rank=rank, scope="row"),
        bytes=total_bytes(tuned, base) + shape[0] * 12,
        peers={
            "kthvalue": lambda: magnitudes().kthvalue(shape[1] - rank + 1, dim=-1).values,
            "topk": lambda: magnitudes().topk(rank, dim=-1, sorted=False).values.amin(-1),
        },
        shared=lambda found: found.threshold,
        exact=True,
        sizes={"rank": rank},
    )


def histogram_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    base, (tuned,) = checkpoints(shape, dtype, 1)
    digits = 1 << 16

    def by_bincount() -> Tensor:
        bits = (tuned.float() - base.float()).abs().flatten().view(torch.int32)
        return torch.bincount(bits >> 16, minlength=digits)

    return Contest(
        ours=lambda: taskloom.magnitude_histogram(tuned, base, shift=16),
        bytes=total_bytes(tuned, base) + 8 * digits,
        peers={"bincount": by_bincount},
    )


def mask_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    base, (tuned,) = checkpoints(shape, dtype, 1)
    rank = int(DENSITY * base.numel())

    def magnitudes() -> Tensor:
        return (tuned.float() - base.float()).abs().flatten()

    def by_topk() -> Tensor:
        kept = magnitudes().topk(rank, sorted=False).indices
        return torch.zeros(base.numel(), dtype=torch.bool).index_fill_(0, kept, True).view(shape)

    def by_kthvalue() -> Tensor:
        found = magnitudes()
        return (found >= found.kthvalue(base.numel() - rank + 1).values).view(shape)

    return Contest(
        ours=lambda: taskloom.magnitude_mask(tuned, base, rank=rank),
        # A rank is known only after everything was read once.
        bytes=2 * total_bytes(tuned, base) + base.numel(),
        peers={"topk": by_topk, "kthvalue": by_kthvalue},
        sizes={"rank": rank},
    )


ROWS = (
    Row("magnitude_threshold", threshold_contest),
    Row("magnitude_threshold", row_threshold_contest, "by row"),
    Row("magnitude_histogram", histogram_contest),
    Row("magnitude_mask", mask_contest),
)

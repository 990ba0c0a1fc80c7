"""Rows of sparse_merge: the published methods that differ most in what they cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import taskloom
from harness import Call, Contest, Row, Shape
from inputs import checkpoints, total_bytes

TASKS = 3
WEIGHT = 0.5
DENSITY = 0.2
EPSILON = 0.1

ELECT: dict[str, Any] = {"elect": "sign_sum", "combine": "disjoint_mean"}
TIES: dict[str, Any] = {"select": "magnitude", "density": DENSITY, **ELECT}
DARE: dict[str, Any] = {"select": "dropout", "density": DENSITY, "rescale": "density", "seed": 1}
DELLA: dict[str, Any] = {"select": "rank_dropout", "density": DENSITY, "epsilon": EPSILON, "rescale": "density", "seed": 1, **ELECT}

Eager = Callable[[Tensor, list[Tensor]], Tensor]


def merge_contest(peers: dict[str, Eager], passes: int = 1, random: bool = False, **stages: Any) -> Callable[[Shape, torch.dtype], Contest]:
    """A merge that must read its tensors ``passes`` times and write one."""

    def make(shape: Shape, dtype: torch.dtype) -> Contest:
        base, tuned = checkpoints(shape, dtype, TASKS)

        def bound(peer: Eager) -> Call:
            return lambda: peer(base, tuned)

        return Contest(
            ours=lambda: taskloom.sparse_merge(base, tuned, WEIGHT, **stages),
            bytes=passes * total_bytes(base, *tuned) + base.nbytes,
            peers={name: bound(peer) for name, peer in peers.items()},
            shared=None if random else lambda result: result,
            sizes={"tasks": TASKS} | ({"density": DENSITY} if stages else {}),
        )

    return make


def merge_out_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    base, tuned = checkpoints(shape, dtype, TASKS)
    out = torch.empty_like(base)
    return Contest(
        ours=lambda: taskloom.sparse_merge(base, tuned, WEIGHT, out=out),
        bytes=total_bytes(base, *tuned, out),
        peers={"a sum in a loop": lambda: out.copy_(summed_in_a_loop(base, tuned))},
        changes=out,
        sizes={"tasks": TASKS},
    )


def counted_deltas(base: Tensor, tuned: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What a merge report has of a sum of task vectors: inner products of the deltas, conflicts, whether one is not finite."""
    deltas = torch.stack([task.float() - base.float() for task in tuned]).flatten(1)
    conflicts = ((deltas > 0).any(0) & (deltas < 0).any(0)).sum()
    return deltas @ deltas.T, conflicts, ~deltas.isfinite().all()


def merge_statistics_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    base, tuned = checkpoints(shape, dtype, TASKS)
    out = torch.empty_like(base)

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        _, counted = taskloom.sparse_merge(base, tuned, WEIGHT, out=out, statistics=True)
        return counted.dots.float(), counted.conflicts, counted.nonfinite

    def beside() -> tuple[Tensor, Tensor, Tensor]:
        out.copy_(summed_in_a_loop(base, tuned))
        return counted_deltas(base, tuned)

    return Contest(
        ours=ours,
        bytes=total_bytes(base, *tuned, out),
        peers={"a sum in a loop, and its statistics": beside},
        sizes={"tasks": TASKS},
    )


def stacked_deltas(base: Tensor, tuned: list[Tensor]) -> Tensor:
    return torch.stack([task.float() - base.float() for task in tuned])


def stacked_sum(base: Tensor, tuned: list[Tensor]) -> Tensor:
    return (base.float() + (WEIGHT * stacked_deltas(base, tuned)).sum(0)).to(base.dtype)


def summed_in_a_loop(base: Tensor, tuned: list[Tensor]) -> Tensor:
    origin = base.float()
    total = torch.zeros_like(origin)
    for task in tuned:
        total.add_(task.float() - origin, alpha=WEIGHT)
    return (origin + total).to(base.dtype)


def elected_mean(deltas: Tensor) -> Tensor:
    """TIES' second half on weighted deltas, zero where they were not kept."""
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agree = deltas * sign > 0
    return torch.where(agree, deltas, 0).sum(0) / (WEIGHT * agree.sum(0)).clamp(min=WEIGHT)


def ties_by_topk(base: Tensor, tuned: list[Tensor]) -> Tensor:
    deltas = stacked_deltas(base, tuned)
    flat = deltas.flatten(1)
    places = flat.abs().topk(int(DENSITY * base.numel()), sorted=False).indices
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, places, True).view_as(deltas)
    return (base.float() + elected_mean(torch.where(kept, WEIGHT * deltas, 0))).to(base.dtype)


def ties_by_kthvalue(base: Tensor, tuned: list[Tensor]) -> Tensor:
    deltas = stacked_deltas(base, tuned)
    magnitudes = deltas.abs().flatten(1)
    cut = magnitudes.kthvalue(base.numel() - int(DENSITY * base.numel()) + 1, dim=1).values
    kept = deltas.abs() >= cut.view(-1, 1, 1)
    return (base.float() + elected_mean(torch.where(kept, WEIGHT * deltas, 0))).to(base.dtype)


def dare_by_bernoulli(base: Tensor, tuned: list[Tensor]) -> Tensor:
    deltas = stacked_deltas(base, tuned)
    kept = torch.bernoulli(torch.full_like(deltas, DENSITY))
    return (base.float() + (WEIGHT * kept * deltas / DENSITY).sum(0)).to(base.dtype)


def della_by_argsort(base: Tensor, tuned: list[Tensor]) -> Tensor:
    deltas = stacked_deltas(base, tuned)
    length = deltas.shape[-1]
    ranks = torch.empty_like(deltas)
    rising = torch.linspace(DENSITY - EPSILON, DENSITY + EPSILON, length).expand_as(deltas)
    keep = ranks.scatter_(-1, deltas.abs().argsort(dim=-1), rising)
    return (base.float() + elected_mean(WEIGHT * torch.bernoulli(keep) * deltas / keep)).to(base.dtype)


ROWS = (
    Row("sparse_merge", merge_contest({"stack and sum": stacked_sum, "a sum in a loop": summed_in_a_loop}), "task arithmetic"),
    Row("sparse_merge_out", merge_out_contest, "task arithmetic"),
    Row("sparse_merge_statistics_out", merge_statistics_contest, "task arithmetic"),
    # A rank is known only after everything was read once.
    Row("sparse_merge", merge_contest({"topk": ties_by_topk, "kthvalue": ties_by_kthvalue}, passes=2, **TIES), "TIES"),
    Row("sparse_merge", merge_contest({"bernoulli": dare_by_bernoulli}, random=True, **DARE), "DARE"),
    Row("sparse_merge", merge_contest({"argsort and bernoulli": della_by_argsort}, random=True, **DELLA), "DELLA"),
)

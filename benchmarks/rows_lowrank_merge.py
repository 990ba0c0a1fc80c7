"""Rows of lowrank_merge and its kin."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import taskloom
from harness import Contest, Row, Shape
from inputs import total_bytes, weights
from taskloom.ops.lowrank import lowrank_merge_backward

RANK = 16
SHAPE: Shape = (4096, 4096)
TASKS = 4
# Small enough that repeated merges into one weight stay near it.
SCALE = 1e-3


def factors(shape: Shape, dtype: torch.dtype, adapters: int) -> tuple[list[Tensor], list[Tensor]]:
    """A [r, in] and B [out, r] of each adapter."""
    rows, columns = shape
    right = [weights((RANK, columns), 10 + place, dtype) for place in range(adapters)]
    return right, [weights((rows, RANK), 50 + place, dtype) for place in range(adapters)]


def peft_delta(a: Tensor, b: Tensor) -> Tensor:
    """The product as PEFT makes it: 16-bit factors in float32 on a CPU, then back."""
    return ((b.float() @ a.float()) * SCALE).to(b.dtype)


def inplace_contest(adapters: int) -> Callable[[Shape, torch.dtype], Contest]:
    def make(shape: Shape, dtype: torch.dtype) -> Contest:
        target, (right, left) = weights(shape, 0, dtype), factors(shape, dtype, adapters)

        def by_delta() -> None:
            for a, b in zip(right, left, strict=True):
                target.add_(peft_delta(a, b))

        def by_addmm() -> None:
            for a, b in zip(right, left, strict=True):
                target.addmm_(b, a, alpha=SCALE)

        return Contest(
            ours=lambda: taskloom.lowrank_merge_(target, right, left, scale=SCALE),
            bytes=2 * target.nbytes + total_bytes(*right, *left),
            peers={
                "a delta, then +=, as PEFT": by_delta,
                "addmm_ in a loop": by_addmm,
                "addmm_ of all factors": lambda: target.addmm_(torch.cat(left, 1), torch.cat(right), alpha=SCALE),
            },
            changes=target,
            sizes={"rank": RANK, "adapters": adapters},
        )

    return make


def merge_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    base, (right, left) = weights(shape, 0, dtype), factors(shape, dtype, 4)

    def by_delta() -> Tensor:
        merged = base.clone()
        for a, b in zip(right, left, strict=True):
            merged += peft_delta(a, b)
        return merged

    return Contest(
        ours=lambda: taskloom.lowrank_merge(base, right, left, scale=SCALE),
        bytes=2 * base.nbytes + total_bytes(*right, *left),
        peers={
            "a delta, then +=, as PEFT": by_delta,
            "addmm of all factors": lambda: torch.addmm(base, torch.cat(left, 1), torch.cat(right), alpha=SCALE),
        },
        sizes={"rank": RANK, "adapters": 4},
    )


def tasks_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    base, (right, left) = weights(shape, 0, dtype), (torch.stack(one) for one in factors(shape, dtype, TASKS))
    return Contest(
        ours=lambda: taskloom.lowrank_merge_tasks(base, right, left, scale=SCALE),
        bytes=(1 + TASKS) * base.nbytes + total_bytes(right, left),
        peers={
            "addmm in a loop": lambda: torch.stack([torch.addmm(base, b, a, alpha=SCALE) for a, b in zip(right, left, strict=True)]),
            "baddbmm": lambda: torch.baddbmm(base.expand(TASKS, *base.shape), left, right, alpha=SCALE),
        },
        sizes={"rank": RANK, "tasks": TASKS},
    )


def norm_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    base, (right, left) = weights(shape, 0, dtype), factors(shape, dtype, 1)
    a, b = right[0], left[0]

    def by_gram() -> Tensor:
        wide, first, second = base.float(), a.float(), b.float()
        crossed = ((wide @ first.T) * second).sum(1)
        return (wide.square().sum(1) + 2 * SCALE * crossed + SCALE**2 * ((second @ (first @ first.T)) * second).sum(1)).sqrt()

    return Contest(
        ours=lambda: taskloom.lowrank_norm(base, a, b, scale=SCALE),
        bytes=base.nbytes + total_bytes(a, b),
        peers={
            "norm of the sum, as PEFT": lambda: torch.linalg.norm(base.float() + SCALE * (b.float() @ a.float()), dim=1),
            "Gram identity": by_gram,
        },
        sizes={"rank": RANK},
    )


def backward_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    gradient, (right, left), weight = weights(shape, 0, dtype), factors(shape, dtype, 4), weights((4,), 9)

    def by_product() -> list[Tensor]:
        wide = gradient.float()
        firsts = [share * (b.float().T @ wide) for share, b in zip(weight, left, strict=True)]
        seconds = [share * (wide @ a.float().T) for share, a in zip(weight, right, strict=True)]
        products = torch.stack([(wide * (b.float() @ a.float())).sum() for a, b in zip(right, left, strict=True)])
        # Sums over all entries of random matrices nearly cancel: they are made, and not compared.
        assert products.shape == weight.shape
        return [one.to(dtype) for one in (*firsts, *seconds)]

    return Contest(
        ours=lambda: lowrank_merge_backward(gradient, None, right, left, weight),
        bytes=gradient.nbytes + 2 * total_bytes(*right, *left),
        peers={"through each B A": by_product},
        shared=lambda found: found[:-1],
        sizes={"rank": RANK, "adapters": 4},
    )


ROWS = (
    Row("lowrank_merge_", inplace_contest(1), "1 adapter", shape=SHAPE, memory=True),
    Row("lowrank_merge_", inplace_contest(8), "8 adapters", shape=SHAPE, memory=True),
    Row("lowrank_merge", merge_contest, "4 adapters", shape=SHAPE, memory=True),
    Row("lowrank_merge_tasks", tasks_contest, f"{TASKS} tasks", memory=True),
    Row("lowrank_norm", norm_contest, shape=SHAPE, memory=True),
    Row("lowrank_merge_backward", backward_contest, "4 adapters", memory=True),
)

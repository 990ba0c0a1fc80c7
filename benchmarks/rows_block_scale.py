"""Rows of block_scale_merge and of the gradients of its coefficients."""

from __future__ import annotations

import torch
from torch import Tensor

import taskloom
from harness import Contest, Row, Shape
from inputs import total_bytes, weights
from taskloom.ops.masked import block_scale_merge_backward

TASKS = 8
BLOCKS = 8
GROUPS = 10


def pool(shape: Shape, dtype: torch.dtype) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Blocks that sum to the shape, and tasks of such blocks."""
    block = (shape[0] // BLOCKS, shape[1])
    base = [weights(block, place, dtype) for place in range(BLOCKS)]
    return base, [[weights(block, 100 * task + place, dtype) for place in range(BLOCKS)] for task in range(1, TASKS + 1)]


def merge_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    base, deltas = pool(shape, dtype)
    coef = weights((TASKS, BLOCKS), 9)
    stacked = [torch.stack([task[place] for task in deltas]) for place in range(BLOCKS)]

    def scaled(place: int) -> Tensor:
        total = torch.zeros(base[place].shape)
        for task, factors in zip(deltas, coef, strict=True):
            total += factors[place] * task[place].float()
        return total

    def by_einsum(place: int) -> Tensor:
        return torch.einsum("t,trc->rc", coef[:, place], stacked[place].float())

    return Contest(
        ours=lambda: taskloom.block_scale_merge(base, deltas, coef),
        bytes=2 * total_bytes(*base) + sum(total_bytes(*task) for task in deltas),
        peers={
            "a sum in a loop": lambda: [(one.float() + scaled(place)).to(dtype) for place, one in enumerate(base)],
            "einsum on a stack": lambda: [(one.float() + by_einsum(place)).to(dtype) for place, one in enumerate(base)],
        },
        sizes={"tasks": TASKS, "blocks": BLOCKS},
    )


def groups_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    base, deltas = weights(shape, 0, dtype), [weights(shape, seed, dtype) for seed in range(1, TASKS + 1)]
    coef = weights((TASKS, GROUPS), 9).unsqueeze(1)
    partition = torch.randint(0, GROUPS, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    index = partition.int()

    def by_indexing() -> Tensor:
        total = torch.zeros(shape)
        for delta, factors in zip(deltas, coef, strict=True):
            total += factors[0][index] * delta.float()
        return (base.float() + total).to(dtype)

    return Contest(
        ours=lambda: taskloom.block_scale_merge(base, deltas, coef, partition),
        bytes=2 * base.nbytes + total_bytes(partition, *deltas),
        peers={"index and sum in a loop": by_indexing},
        sizes={"tasks": TASKS, "groups": GROUPS},
    )


def backward_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    gradients, deltas = pool(shape, dtype)
    stacked = [torch.stack([task[place] for task in deltas]) for place in range(BLOCKS)]

    def by_dot() -> Tensor:
        return torch.stack(
            [
                torch.stack([torch.dot(one.float().flatten(), task[place].float().flatten()) for place, one in enumerate(gradients)])
                for task in deltas
            ]
        )

    def by_einsum() -> Tensor:
        products = [torch.einsum("trc,rc->t", stacked[place].float(), one.float()) for place, one in enumerate(gradients)]
        return torch.stack(products, dim=1)

    return Contest(
        ours=lambda: block_scale_merge_backward(gradients, deltas),
        bytes=total_bytes(*gradients) + sum(total_bytes(*task) for task in deltas),
        peers={"dot products in a loop": by_dot, "einsum on a stack": by_einsum},
        shared=lambda found: found.squeeze(-1).float(),
        sizes={"tasks": TASKS, "blocks": BLOCKS},
    )


ROWS = (
    Row("block_scale_merge", merge_contest, f"{BLOCKS} blocks"),
    Row("block_scale_merge", groups_contest, f"{GROUPS} groups"),
    Row("block_scale_merge_backward", backward_contest, f"{BLOCKS} blocks"),
)

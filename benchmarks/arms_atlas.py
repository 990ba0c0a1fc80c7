"""Compositions of task vectors with a coefficient for each vector and block, as `bench_atlas_composition.py` compares them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import taskloom
from inputs import total_bytes, weights

OURS = "ours"
Compose = Callable[[Tensor], list[Tensor]]


def vision_transformer(width: int, layers: int = 12, patch: int = 32, tokens: int = 50) -> list[tuple[int, ...]]:
    """The shapes of CLIP's image encoder in the order of its parameters: width 768 is ViT-B/32 with 88 million."""
    block = [(3 * width, width), (3 * width,), (width, width), (width,), (width,), (width,)]
    block += [(4 * width, width), (4 * width,), (width, 4 * width), (width,), (width,), (width,)]
    first: list[tuple[int, ...]] = [(width,), (tokens, width), (2 * width // 3, width), (width, 3, patch, patch), (width,), (width,)]
    return first + layers * block + [(width,), (width,)]


@dataclass(frozen=True)
class Pool:
    """Blocks of weights, as many of each task vector, a coefficient for each vector and block, and the gradients of the composed blocks."""

    base: list[Tensor]
    deltas: list[list[Tensor]]
    coef: Tensor
    partition: list[Tensor] | None
    gradients: list[Tensor]

    @staticmethod
    def make(shapes: Sequence[tuple[int, ...]], tasks: int, dtype: torch.dtype, groups: int = 1) -> Pool:
        """Base in float32, vectors in `dtype`; above one group also a random partition of every block."""
        base = [weights(shape, place) for place, shape in enumerate(shapes)]
        deltas = [[0.1 * weights(shape, 1000 * task + place) for place, shape in enumerate(shapes)] for task in range(1, tasks + 1)]
        coef = weights((tasks, len(shapes), groups) if groups > 1 else (tasks, len(shapes)), 9)
        generator = torch.Generator().manual_seed(0)
        partition = [torch.randint(0, groups, shape, generator=generator, dtype=torch.uint8) for shape in shapes] if groups > 1 else None
        gradients = [weights(shape, 500 + place) for place, shape in enumerate(shapes)]
        return Pool(base, [[one.to(dtype) for one in task] for task in deltas], coef, partition, gradients)

    @property
    def forward_bytes(self) -> int:
        """What has to be read and written at least for the composition."""
        return self.backward_bytes + total_bytes(*self.base)

    @property
    def backward_bytes(self) -> int:
        """What has to be read at least for the gradient of the coefficients."""
        return total_bytes(*self.gradients, *(self.partition or ()), *(one for task in self.deltas for one in task))


@dataclass(frozen=True)
class Arm:
    """A way to compose: what it calls, what it keeps beside the pool's tensors, and how near its results have to be to ours."""

    compose: Compose
    differentiable: bool = True
    kept: int = 0
    tolerance: float = 1e-6
    gradient_tolerance: float = 1e-4


def _loop(pool: Pool, convert: bool) -> Compose:
    def compose(coef: Tensor) -> list[Tensor]:
        composed = []
        for place, one in enumerate(pool.base):
            total: Tensor | int = 0
            for factors, task in zip(coef, pool.deltas, strict=True):
                total = total + factors[place] * (task[place].float() if convert else task[place])
            composed.append(one + total)
        return composed

    return compose


def _foreach(pool: Pool) -> Compose:
    def compose(coef: Tensor) -> list[Tensor]:
        listed = coef.tolist()
        total = list(torch._foreach_mul(pool.deltas[0], listed[0]))
        for task, factors in zip(pool.deltas[1:], listed[1:], strict=True):
            torch._foreach_add_(total, torch._foreach_mul(task, factors))
        return [one + change for one, change in zip(pool.base, total, strict=True)]

    return compose


def _einsum(pool: Pool) -> tuple[Compose, int]:
    stacked = [torch.stack([task[place] for task in pool.deltas]).float() for place in range(len(pool.base))]

    def compose(coef: Tensor) -> list[Tensor]:
        return [one + torch.einsum("t,t...->...", coef[:, place], stacked[place]) for place, one in enumerate(pool.base)]

    return compose, sum(one.nbytes for one in stacked)


def _one_hot(pool: Pool, partition: list[Tensor]) -> tuple[Compose, int]:
    """As aTLAS's own code: K copies of every block in the vectors' dtype, one for each group, 1 where the entry is of the group."""
    dtype, groups = pool.deltas[0][0].dtype, pool.coef.shape[2]
    masks = [torch.stack([(part == group).to(dtype) for group in range(groups)]) for part in partition]

    def compose(coef: Tensor) -> list[Tensor]:
        composed = []
        for place, one in enumerate(pool.base):
            mask, total = masks[place], torch.zeros(())
            for factors, task in zip(coef, pool.deltas, strict=True):
                shape = (-1, *[1] * one.dim())
                total = total + (factors[place].view(shape) * mask).sum(0) * task[place]
            composed.append(one + total)
        return composed

    return compose, sum(mask.nbytes for mask in masks)


def _indexed(pool: Pool, partition: list[Tensor]) -> tuple[Compose, int]:
    """Without the one-hot copies: each entry's coefficient is looked up. An index of 32 bits is kept, since torch takes no byte for one."""
    index = [part.int() for part in partition]

    def compose(coef: Tensor) -> list[Tensor]:
        composed = []
        for place, one in enumerate(pool.base):
            total: Tensor | int = 0
            for factors, task in zip(coef, pool.deltas, strict=True):
                total = total + factors[place][index[place]] * task[place].float()
            composed.append(one + total)
        return composed

    return compose, sum(one.nbytes for one in index)


def _ours(pool: Pool) -> Compose:
    def compose(coef: Tensor) -> list[Tensor]:
        return list(taskloom.block_scale_merge(pool.base, pool.deltas, coef, pool.partition))

    return compose


def arms(pool: Pool, compiled: bool = True) -> dict[str, Arm]:
    """Every arm that fits the pool, by name; the loop is the official code's sum, in which 16-bit vectors make 16-bit products."""
    found = {OURS: Arm(_ours(pool))}
    narrow = pool.deltas[0][0].dtype != torch.float32
    if pool.partition is not None:
        one_hot, masks = _one_hot(pool, pool.partition)
        indexed, index = _indexed(pool, pool.partition)
        found["loop, one-hot"] = Arm(one_hot, kept=masks)
        found["loop, indexed"] = Arm(indexed, kept=index)
        if compiled:
            found["compiled, indexed"] = Arm(torch.compile(indexed, dynamic=False), kept=index)
        return found
    near, near_gradient = (4e-3, 2e-2) if narrow else (1e-6, 1e-4)
    found["loop"] = Arm(_loop(pool, convert=False), tolerance=near, gradient_tolerance=near_gradient)
    if narrow:
        found["loop in float32"] = Arm(_loop(pool, convert=True))
    found["foreach"] = Arm(_foreach(pool), differentiable=False, tolerance=near)
    einsum, stack = _einsum(pool)
    found["einsum on a stack"] = Arm(einsum, kept=stack)
    if compiled:
        found["compiled"] = Arm(torch.compile(_loop(pool, convert=True), dynamic=False))
    return found

"""Contracts of block_scale_merge and its backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from contract import Case, Contract
from samples import weights

import taskloom
from taskloom.ops.masked import block_scale_merge_backward

SHAPES = ((13, 79), (7,), (), (3, 0))


def random_partition(*shape: int, groups: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, groups, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def _blocks(seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [weights(*shape, seed=seed + place, dtype=dtype) for place, shape in enumerate(SHAPES)]


def block_scale_merge_cases() -> Iterator[Case]:
    mixes = ((torch.float32, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32))
    for base, delta in mixes:
        yield Case(f"{base}-{delta}", (_blocks(0, base), [_blocks(10, delta), _blocks(20, delta)], weights(2, 4, seed=1)))
    partition = [random_partition(*shape, groups=10) for shape in SHAPES]
    yield Case("groups", (_blocks(0, torch.float32), [_blocks(10, torch.float16)] * 3, weights(3, 4, 10), partition))
    float64 = (_blocks(0, torch.float32), [_blocks(10, torch.float64), _blocks(20, torch.float32)], weights(2, 4, dtype=torch.float64))
    yield Case("float64", float64)
    numel = (1 << 18) + 13
    yield Case("two chunks", (weights(numel), [weights(numel, seed=1), weights(numel, seed=2)], weights(2)))
    grouped = random_partition(numel, groups=256)
    yield Case("two chunks in groups", (weights(numel), [weights(numel, seed=1)], weights(1, 1, 256), grouped))
    # More tasks than are read side by side, dtypes that change from task to task, and groups that do or do not fit in registers.
    alike = [weights(300, seed=seed, dtype=torch.float16) for seed in range(1, 14)]
    yield Case("13 tasks", (weights(300), alike, weights(13)))
    turns = [weights(300, seed=seed, dtype=torch.float16 if seed % 3 else torch.bfloat16) for seed in range(1, 6)]
    yield Case("tasks of two dtypes", (weights(300, dtype=torch.bfloat16), turns, weights(5)))
    for groups in (16, 17, 33):
        grouped = random_partition(300, groups=groups)
        yield Case(f"{groups} groups", (weights(300), alike[:2], weights(2, 1, groups), grouped))
    wide = [weights(300, seed=seed, dtype=torch.float64 if seed % 2 else torch.float32) for seed in range(1, 6)]
    yield Case("float64 in groups", (weights(300), wide, weights(5, 1, 7), random_partition(300, groups=7)))
    strided = (weights(31, 7).t(), [weights(7, 62)[:, ::2]], weights(4)[::4], random_partition(31, 7, groups=1).t())
    yield Case("strided", strided)
    gradient = weights(2, 1, 3).requires_grad_()
    leaf = weights(40, seed=1, dtype=torch.float16).requires_grad_()
    yield Case("gradient", (weights(40), [leaf, weights(40)], gradient, random_partition(40, groups=3)))


def backward_cases() -> Iterator[Case]:
    for case in block_scale_merge_cases():
        base, deltas, coef, *partition = case.args
        if isinstance(base, torch.Tensor):
            base, deltas = [base], [[delta] for delta in deltas]
            partition = [partition] if partition else []
        groups = coef.shape[2] if coef.dim() == 3 else 1
        yield Case(case.name, (base, deltas, *partition), {"groups": groups})


CONTRACTS = (
    Contract("block_scale_merge", taskloom.block_scale_merge, block_scale_merge_cases),
    Contract("block_scale_merge_backward", block_scale_merge_backward, backward_cases),
)

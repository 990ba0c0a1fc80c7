"""Contracts of task_mask and multi_task_vector."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from contract import Case, Contract
from samples import awkward, moved, weights

import taskloom

MIXES = (
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float32, torch.float16, torch.bfloat16),
    (torch.float16, torch.float64, torch.float32),
)


def task_mask_cases() -> Iterator[Case]:
    for place, (base_dtype, tuned_dtype, sum_dtype) in enumerate(MIXES):
        base = weights(1001 + place, seed=place, dtype=base_dtype)
        tuned, other = moved(base, 1, dtype=tuned_dtype), moved(base, 2)
        total = taskloom.multi_task_vector(base, [tuned, other]).to(sum_dtype)
        yield Case(f"{base_dtype}-{tuned_dtype}-{sum_dtype}", (base, tuned, total, 0.4))
    base = weights((1 << 18) + 13, seed=9)
    yield Case("two chunks", (base, moved(base, 3), weights(base.numel(), seed=4, scale=0.1), 1.0))
    yield Case("empty", (torch.empty(0, 3), torch.empty(0, 3), torch.empty(0, 3)))
    yield Case("scalar", (torch.tensor(1.0), torch.tensor(2.0), torch.tensor(1.0)))
    yield Case("transposed", (weights(31, 7).t(), weights(31, 7, seed=1).t(), weights(7, 31, seed=2)))
    values = awkward()
    grid = (values.repeat_interleave(13).repeat(13), values.repeat(169), values.repeat_interleave(169))
    yield Case("awkward values", grid)


def multi_task_vector_cases() -> Iterator[Case]:
    for place, dtypes in enumerate(MIXES):
        base = weights(1000 + place, seed=place, dtype=dtypes[0])
        yield Case("-".join(map(str, dtypes)), (base, [moved(base, 1, dtype=dtypes[1]), moved(base, 2, dtype=dtypes[2])], [0.7, -1.3]))
    base = weights((1 << 18) + 13, seed=9)
    yield Case("two chunks", (base, [moved(base, 3), moved(base, 4), moved(base, 5)], 0.3))
    yield Case("empty", (torch.empty(2, 0), [torch.empty(2, 0)]))
    yield Case("scalar", (torch.tensor(1.0), [torch.tensor(2.0)]))
    yield Case("transposed", (weights(31, 7).t(), [weights(31, 7, seed=1).t(), weights(7, 62, seed=2)[:, ::2]]))


CONTRACTS = (
    Contract("task_mask", taskloom.task_mask, task_mask_cases),
    Contract("multi_task_vector", taskloom.multi_task_vector, multi_task_vector_cases),
)

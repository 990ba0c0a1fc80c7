"""Contracts of lowrank_apply and its backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from contract import Case, Contract
from samples import weights

import taskloom
from taskloom.ops.lowrank import lowrank_apply_backward

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def random_tasks(*shape: int, tasks: int, seed: int = 0, lowest: int = -1) -> torch.Tensor:
    return torch.randint(lowest, tasks, shape, generator=torch.Generator().manual_seed(seed))


def adapters(tasks: int, columns: int, rows: int, rank: int, dtype: torch.dtype = F32) -> tuple[torch.Tensor, torch.Tensor]:
    return weights(tasks, rank, columns, seed=1, dtype=dtype, scale=0.2), weights(tasks, rows, rank, seed=2, dtype=dtype, scale=0.2)


def apply_cases() -> Iterator[Case]:
    task = random_tasks(23, tasks=5)
    for x, factor in ((F32, F32), (BF16, BF16), (F16, F32), (F32, BF16), (F32, F64)):
        given = (weights(23, 37, dtype=x), *adapters(5, 37, 29, 3, factor), weights(5, seed=4))
        yield Case(f"{x}-{factor}", (*given, task, weights(29, 37, seed=5, dtype=x), weights(29, seed=6, dtype=x)))
        yield Case(f"{x}-{factor}, sum", given)
    yield Case("only the adapters", (weights(23, 37), *adapters(5, 37, 29, 3), 0.5, task.int()), {"scale": [1.0, 2.0, 3.0, 4.0, 5.0]})
    yield Case("bias", (weights(23, 37), *adapters(5, 37, 29, 3), 1.0, task, None, weights(29, seed=6)))
    yield Case("no adapter in any row", (weights(4, 7), *adapters(2, 7, 5, 3), 1.0, torch.full((4,), -1)))
    yield Case("batches", (weights(4, 3, 7), *adapters(2, 7, 5, 3), 1.0, random_tasks(4, tasks=2), weights(5, 7, seed=5)))
    A, B = adapters(3, 7, 5, 4)
    yield Case("strided", (weights(7, 20).t(), A[:, ::2], B[..., ::2], weights(3, 5, seed=3)[:, 1]))
    lists = ([weights(rank, 7, seed=rank) for rank in (2, 4, 1)], [weights(5, rank, seed=9 + rank) for rank in (2, 4, 1)])
    yield Case("ranks", (weights(6, 7), *lists, [0.5, 1.0, 2.0], random_tasks(6, tasks=3)))
    yield Case("one rank", (weights(40, 130), *adapters(2, 130, 70, 1), 1.0, random_tasks(40, tasks=2)))
    yield Case("no rows", (weights(0, 7), *adapters(2, 7, 5, 3), 1.0, torch.zeros(0, dtype=torch.int64)))
    leaves = [one.requires_grad_() for one in (weights(6, 7), *adapters(3, 7, 5, 2), weights(3, seed=3))]
    base = weights(5, 7, seed=5).requires_grad_()
    yield Case("gradient", (*leaves, random_tasks(6, tasks=3), base))


def backward_cases() -> Iterator[Case]:
    for dtype in (F32, BF16, F64):
        given = (weights(23, 29, seed=7, dtype=dtype), weights(23, 37, dtype=dtype), *adapters(5, 37, 29, 3, dtype))
        for name, task in (("tasks", random_tasks(23, tasks=5)), ("sum", None)):
            yield Case(f"{dtype}, {name}", (*given, weights(5, seed=4), task))
            for place in range(4 if dtype == F32 else 0):
                needed = [one == place for one in range(4)]
                yield Case(f"{name}, only {place}", (*given, weights(5, seed=4), task, needed))
    yield Case("no rows", (weights(0, 5), weights(0, 7), *adapters(2, 7, 5, 3), weights(2), torch.zeros(0, dtype=torch.int64)))


CONTRACTS = (
    Contract("lowrank_apply", taskloom.lowrank_apply, apply_cases, torch_products=True),
    Contract("lowrank_apply_backward", lowrank_apply_backward, backward_cases, torch_products=True),
)

"""Contracts of rmm_fit, rmm_reconstruct and rmm_linear."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from contract import Case, Contract
from samples import normal

import taskloom

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def fit_cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        yield Case(f"{dtype}", (normal(5, 11, 7, dtype=dtype), 3))
    yield Case("fewer entries than tasks", (normal(9, 10, 4), 2))
    yield Case("as many entries as tasks", (normal(6, 9, 6), 5))
    yield Case("every direction", (normal(4, 8, 6), 3))
    yield Case("every entry", (normal(9, 3, 4), 4))
    yield Case("not centred", (normal(4, 9, 6), 4, False))
    yield Case("two tasks", (normal(2, 17, 16), 1))
    yield Case("one entry", (normal(5, 3, 1), 1))
    yield Case("equal tasks", (normal(1, 9, 6).expand(4, 9, 6), 2))
    yield Case("one direction", (normal(5, 9, 1) * normal(9, 6, seed=1) + normal(9, 6, seed=2), 3))
    yield Case("zeros", (torch.zeros(3, 5, 4), 2))
    yield Case("strided", (normal(7, 10, 6).transpose(0, 2)[:, ::2], 3))
    yield Case("no positions", (torch.empty(3, 0, 4), 2))
    yield Case("paper", (normal(8, 40, 16), 3))


def parts(positions: int, width: int, rank: int, tasks: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Parts:
    """Mean, basis and coefficients."""
    shapes = ((positions, width), (positions, rank, width), (tasks, positions, rank))
    mean, basis, coefficients = (normal(*shape, seed=seed + place, dtype=dtype) for place, shape in enumerate(shapes))
    return mean, basis, coefficients


def reconstruct_cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        mean, basis, coefficients = parts(37, 7, 3, 2, dtype=dtype)
        yield Case(f"{dtype}", (mean, basis, coefficients[1]))
    mean, basis, coefficients = parts(9, 16, 1, 2)
    yield Case("one direction", (mean, basis, coefficients[0]))
    yield Case("mixed", (mean.bfloat16(), basis, coefficients[0].half()))
    yield Case("wide coefficients", (mean, basis.bfloat16(), coefficients[0].double()))
    yield Case("strided", (mean[:, ::2], basis[:, :, ::2], normal(9, 2)[:, ::2]))
    mean, basis, coefficients = parts(4001, 16, 3, 1)
    yield Case("several chunks", (mean, basis, coefficients[0]))
    yield Case("no positions", (mean[:0], basis[:0], coefficients[0, :0]))
    leaves = [part.clone().requires_grad_() for part in (mean[:5], basis[:5], coefficients[0, :5])]
    yield Case("gradient", tuple(leaves))


def _batch(rows: int, m: int, d: int, r: int, ranks: tuple[int, int] = (2, 2), n: int = 4, dtype: torch.dtype = torch.float32) -> Case:
    task = torch.randint(0, n, (rows,), generator=torch.Generator().manual_seed(3))
    a, b = parts(m, r, ranks[0], n, 10, dtype), parts(d, r, ranks[1], n, 20, dtype)
    return Case(f"{dtype}", (normal(rows, d, dtype=dtype), task, *a, *b))


def linear_cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        yield _batch(13, 9, 11, 5, dtype=dtype)
    yield Case("other ranks", _batch(70, 33, 65, 16, (1, 3)).args)
    x, task, *rest = _batch(7, 6, 8, 3).args
    yield Case("mixed", (x.bfloat16(), task.int(), *(part.half() if place % 2 else part for place, part in enumerate(rest))))
    yield Case("strided", (normal(8, 7).t(), normal(14).abs().long().clamp(max=3)[::2], *rest))
    yield Case("wide rank", _batch(3, 4, 5, 130).args)
    yield Case("one task", _batch(5, 4, 6, 2, n=1).args)
    yield Case("no rows", (x[:0], task[:0], *rest))
    yield Case("gradient", (x.clone().requires_grad_(), task, *(part.clone().requires_grad_() for part in rest)))


CONTRACTS = (
    Contract("rmm_fit", taskloom.rmm_fit, fit_cases),
    Contract("rmm_reconstruct", taskloom.rmm_reconstruct, reconstruct_cases),
    Contract("rmm_linear", taskloom.rmm_linear, linear_cases, torch_products=True),
)

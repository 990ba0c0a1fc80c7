"""Contracts of expert_sort, expert_combine and its backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from contract import Case, Contract
from samples import normal
from torch import Tensor

import taskloom
from taskloom.ops import gating


def chosen(tokens: int, experts: int, k: int, seed: int = 0, dtype: torch.dtype = torch.int32) -> Tensor:
    """Distinct experts of each token, low numbers more often."""
    tilted = normal(tokens, experts, seed=seed) - 0.1 * torch.arange(experts).float()
    return tilted.topk(k).indices.to(dtype)


def sort_cases() -> Iterator[Case]:
    yield Case("int32", (chosen(37, 12, 3), 12))
    yield Case("int64", (chosen(37, 12, 3, dtype=torch.int64), 12))
    yield Case("blocks", (chosen(37, 12, 3), 12), {"block": 8})
    yield Case("int64 blocks", (chosen(19, 5, 2, dtype=torch.int64), 5), {"block": 3})
    yield Case("blocks of one", (chosen(11, 4, 2), 4), {"block": 1})
    yield Case("fewer entries than experts", (chosen(2, 64, 3), 64), {"block": 16})
    yield Case("one expert", (torch.zeros(9, 1, dtype=torch.int32), 1), {"block": 4})
    yield Case("one expert of many", (torch.full((70, 2), 6, dtype=torch.int32), 9), {"block": 32})
    yield Case("many experts", (chosen(40, 1031, 9), 1031))
    yield Case("several chunks", (chosen(11001, 67, 3), 67), {"block": 64})
    yield Case("very many experts", (chosen(1500, 1100, 8, dtype=torch.int64), 1100))
    yield Case("repeated experts", (torch.tensor([[1, 1, 1], [0, 1, 0]]), 3), {"block": 2})
    yield Case("flat", (chosen(50, 7, 1)[:, 0], 7))
    yield Case("three dimensions", (chosen(24, 10, 2).reshape(4, 6, 2), 10), {"block": 4})
    yield Case("strided", (chosen(60, 9, 4)[::2, ::3], 9), {"block": 4})
    yield Case("no tokens", (torch.empty(0, 2, dtype=torch.int32), 5), {"block": 4})
    yield Case("no tokens, no blocks", (torch.empty(0, 2, dtype=torch.int64), 5))


Inputs = tuple[Tensor, Tensor, Tensor]


def combined(
    tokens: int,
    k: int,
    width: int,
    y_dtype: torch.dtype,
    weight_dtype: torch.dtype = torch.float32,
    inverse_dtype: torch.dtype = torch.int32,
) -> Inputs:
    """Rows, weights and places of rows."""
    places = torch.randperm(tokens * k, generator=torch.Generator().manual_seed(5)).reshape(tokens, k)
    weight = normal(tokens, k, seed=1).softmax(-1)
    return normal(tokens * k, width, dtype=y_dtype), weight.to(weight_dtype), places.to(inverse_dtype)


def _inputs() -> Iterator[tuple[str, Inputs]]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        yield f"{dtype}", combined(13, 3, 37, dtype)
    yield "mixed", combined(9, 2, 20, torch.bfloat16, torch.float16, torch.int64)
    yield "wide weights", combined(9, 2, 20, torch.float32, torch.float64)
    yield "one slot", combined(17, 1, 64, torch.float32)
    yield "many slots", combined(5, 19, 33, torch.bfloat16)
    yield "long rows", combined(3, 9, 1301, torch.float32)
    yield "long rows of halves", combined(3, 2, 1301, torch.float16)
    yield "one entry", combined(6, 2, 1, torch.float32)
    yield "many tokens", combined(700, 2, 24, torch.float32)
    y, weight, inverse = combined(12, 2, 18, torch.float32)
    yield "three dimensions", (y, weight.reshape(3, 4, 2), inverse.reshape(3, 4, 2))
    yield "strided", (normal(18, 24).t(), normal(2, 12, seed=3).t(), inverse)
    yield "no tokens", combined(0, 2, 8, torch.float32)
    yield "no slots", combined(4, 0, 8, torch.float32)
    yield "no entries", combined(4, 2, 0, torch.float32)
    y, weight, inverse = combined(6, 2, 10, torch.float32)
    weight[0, 1], weight[3, 0] = torch.nan, torch.inf
    y[4], y[7] = torch.nan, -torch.inf
    yield "not finite", (y, weight, inverse)


def combine_cases() -> Iterator[Case]:
    for name, inputs in _inputs():
        yield Case(name, inputs)
    y, weight, inverse = combined(8, 3, 21, torch.float32)
    yield Case("gradient", (y.requires_grad_(), weight.requires_grad_(), inverse))


def backward_cases() -> Iterator[Case]:
    for name, (y, weight, inverse) in _inputs():
        slopes = normal(*weight.shape[:-1], y.shape[1], seed=7, dtype=y.dtype)
        yield Case(name, (slopes, y, weight, inverse))
    y, weight, inverse = combined(8, 3, 21, torch.float32)
    slopes = normal(21, 8, seed=2).t()
    yield Case("for y", (slopes, y, weight, inverse), {"for_weight": False})
    yield Case("for weight", (slopes, y, weight, inverse), {"for_y": False})


CONTRACTS = (
    Contract("expert_sort", taskloom.expert_sort, sort_cases),
    Contract("expert_combine", taskloom.expert_combine, combine_cases),
    Contract("expert_combine_backward", gating.expert_combine_backward, backward_cases),
)

"""Contracts of masked_adamw_ and masked_sgd_."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from contract import Case, Contract
from samples import random_packed, set_tail, weights
from torch import Tensor

import taskloom

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ADAMW = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
SGD = ({}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1, "maximize": True})
NESTEROV = {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01}


def _indices(packed: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    return taskloom.unpack_mask(packed, (numel,)).nonzero().squeeze(1).to(dtype)


def _count(active: Tensor | None, numel: int) -> int:
    if active is None:
        return numel
    return int(taskloom.unpack_mask(active, (numel,)).sum()) if active.dtype == torch.uint8 else active.numel()


def _state(active: list[Tensor | None], params: list[Tensor], seed: int) -> list[Tensor]:
    dtypes = [torch.float64 if param.dtype == torch.float64 else torch.float32 for param in params]
    counts = [_count(one, param.numel()) for one, param in zip(active, params, strict=True)]
    return [weights(count, seed=seed + place, dtype=dtype) for place, (count, dtype) in enumerate(zip(counts, dtypes, strict=True))]


def _inputs() -> Iterator[tuple[str, list[Tensor], list[Tensor], list[Tensor | None]]]:
    """Parameters, gradients and active entries."""
    for dtype in DTYPES:
        params = [weights(13, 79, seed=place, dtype=dtype) for place in range(4)]
        packed = random_packed(13 * 79, density=0.3)
        active = [set_tail(packed, 13 * 79), _indices(packed, 13 * 79, torch.int32), _indices(packed, 13 * 79, torch.int64), None]
        yield f"{dtype}", params, [weights(13, 79, seed=10 + place, dtype=dtype) for place in range(4)], active
    numel = (1 << 18) + 1031
    packed = random_packed(numel, density=0.02)
    packed[300:700] = 255
    params, grads = [weights(numel, seed=place) for place in range(2)], [weights(numel, seed=2 + place) for place in range(2)]
    yield "two chunks", params, grads, [packed, _indices(random_packed(numel, density=0.6), numel, torch.int32)]
    strided = [weights(31, 7).t(), weights(7, 62)[:, ::2]]
    yield "strided", strided, [weights(7, 1).expand(7, 31), weights(31, 7).t()], [random_packed(217), None]
    empty = [torch.empty(3, 0), torch.tensor(1.0), weights(9)]
    none = torch.empty(0, dtype=torch.int64)
    yield "empty", empty, [torch.empty(3, 0), torch.tensor(2.0), weights(9, seed=1)], [torch.empty(0).byte(), None, none]


def adamw_cases() -> Iterator[Case]:
    for name, params, grads, active in _inputs():
        first, second = _state(active, params, 20), [one.abs() for one in _state(active, params, 30)]
        yield Case(name, (params, grads, first, second, active, [1.0 + place for place in range(len(params))]), ADAMW)
    param, packed = weights(100), random_packed(100)
    count = _count(packed, 100)
    single: tuple[Any, ...] = (param, weights(100, seed=1), torch.zeros(count), torch.zeros(count), packed, 1)
    yield Case("one tensor", single, {"maximize": True})


def sgd_cases() -> Iterator[Case]:
    options = (*SGD, NESTEROV)
    for place, (name, params, grads, active) in enumerate(_inputs()):
        chosen = options[place % len(options)]
        buffer = _state(active, params, 20) if "momentum" in chosen else None
        yield Case(name, (params, grads, buffer, active, [1.0 + one for one in range(len(params))]), {"lr": 0.1, **chosen})


CONTRACTS = (
    Contract("masked_adamw_", taskloom.masked_adamw_, adamw_cases, mutates=(0, 2, 3)),
    Contract("masked_sgd_", taskloom.masked_sgd_, sgd_cases, mutates=(0, 2)),
)

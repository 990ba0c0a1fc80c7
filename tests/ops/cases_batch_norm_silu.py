"""Contracts of batch_norm_silu and its backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from contract import Case, Contract
from samples import weights
from torch import Tensor

import taskloom
from taskloom import reference
from taskloom.ops.gating import batch_norm_silu_backward

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
TRAIN: dict[str, Any] = {"training": True}


def _given(rows: int, experts: int, features: int, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor, Tensor]:
    vectors = [weights(experts, features, seed=seed, dtype=dtype) for seed in (1, 2)]
    return weights(rows, experts, features, dtype=dtype, scale=3.0) + 1, *vectors


def _running(experts: int, features: int, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    return weights(experts, features, seed=3, dtype=dtype), weights(experts, features, seed=4, dtype=dtype).square() + 0.5


def _all_of(case: Case) -> Case:
    """The same with None for tensors that are not given, so that the running statistics have their places."""
    return Case(case.name, (*case.args, *(None,) * (5 - len(case.args))), case.kwargs)


def norm_cases() -> Iterator[Case]:
    yield from map(_all_of, _norm_cases())


def _norm_cases() -> Iterator[Case]:
    for dtype in (F32, F16, BF16, F64):
        yield Case(f"{dtype}", (*_given(35, 3, 7, dtype), *_running(3, 7, dtype)), TRAIN)
    for dtype in (F32, BF16):
        yield Case(f"{dtype}, running", (*_given(35, 3, 7, dtype), *_running(3, 7, dtype)), {"training": False})
    z, weight, bias = _given(9, 2, 37)
    for activation in (None, "relu"):
        yield Case(f"{activation}", (z, weight, bias), TRAIN | {"activation": activation, "eps": 0.1})
    yield Case("mixed", (z.half(), weight.bfloat16(), bias.double(), *_running(2, 37)), TRAIN | {"momentum": 0.5})
    yield Case("plain", (z + 10,), TRAIN)
    yield Case("only bias", (z, None, bias), TRAIN)
    yield Case("experts first", (weights(3, 35, 7).transpose(0, 1), *_given(1, 3, 7)[1:]), TRAIN)
    yield Case("experts first, running", (weights(3, 35, 7).half().transpose(0, 1), None, None, *_running(3, 7)), {"training": False})
    yield Case("strided", (weights(9, 2, 74)[..., ::2], weights(37, 2, seed=1).t(), bias), TRAIN)
    yield Case("two parts", _given(530, 2, 270), TRAIN)
    yield Case("two rows", _given(2, 1, 1), TRAIN)
    yield Case("no rows", (*_given(0, 2, 37), *_running(2, 37)), {"training": False})
    yield Case("no experts", _given(4, 0, 7), TRAIN)
    yield Case("gradient", tuple(one.requires_grad_() for one in _given(35, 3, 7)), TRAIN)


def backward_cases() -> Iterator[Case]:
    for rows, experts, features, dtype in ((35, 3, 7, F32), (35, 3, 7, F64), (35, 3, 7, BF16), (530, 2, 270, F32)):
        z, weight, bias = _given(rows, experts, features, dtype)
        name = f"{rows} rows, {dtype}"
        gradient = weights(rows, experts, features, seed=7, dtype=dtype)
        found = reference.gating.batch_norm_silu(z, weight, bias, None, None, 1e-5, "silu")[1:]
        yield Case(name, (gradient, z, weight, bias, *found))
        if dtype != F64:
            yield Case(f"{name}, running", (gradient, z, weight, bias, *found), {"running": True})
        if dtype != F32 or rows > 100:
            continue
        for activation in (None, "relu"):
            yield Case(f"{activation}", (gradient, z, weight, bias, *found), {"activation": activation})
        spoilt = z.clone()
        spoilt[2, 1, 3] = torch.inf
        options = {"running": True, "activation": None, "for_weight": False}
        yield Case("an infinity, running", (gradient, spoilt, weight, bias, *found), options)
        for part in ("z", "weight", "bias"):
            yield Case(f"only {part}", (gradient, z, weight, bias, *found), {f"for_{one}": one == part for one in ("z", "weight", "bias")})
        yield Case("plain", (gradient, z, None, None, *found))
        first = [one.transpose(0, 1).contiguous().transpose(0, 1) for one in (gradient, z)]
        yield Case("experts first", (*first, weight, bias, *found))
        yield Case("gradient of one value", (torch.ones(()).expand(z.shape), z, weight, bias, *found))
    none = _given(0, 3, 7)
    yield Case("no rows", (none[0], *none, *_running(3, 7)), {"running": True})


CONTRACTS = (
    Contract("batch_norm_silu", taskloom.batch_norm_silu, norm_cases, mutates=(3, 4), single=2e-6),
    Contract("batch_norm_silu_backward", batch_norm_silu_backward, backward_cases, single=2e-6),
)

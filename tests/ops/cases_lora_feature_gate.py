"""Contracts of lora_feature_gate and its backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from contract import Case, Contract
from samples import weights
from torch import Tensor

import taskloom
from taskloom import reference
from taskloom.ops.gating import lora_feature_gate_backward

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


def _given(rows: int, features: int, maps: int, rank: int, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shares = weights(rows, maps, seed=3).softmax(1).to(dtype)
    x = weights(rows, features, dtype=dtype)
    return (
        x,
        weights(maps, features, rank, seed=1, dtype=dtype, scale=features**-0.5),
        weights(maps, rank, features, seed=2, dtype=dtype),
        shares,
    )


def gate_cases() -> Iterator[Case]:
    for dtype in (F32, F16, BF16, F64):
        yield Case(f"{dtype}", _given(5, 37, 2, 3, dtype))
    x, down, up, shares = _given(5, 37, 3, 4)
    yield Case("mixed", (x.half(), down.bfloat16(), up.double(), shares))
    yield Case("one of each", _given(1, 1, 1, 1))
    yield Case("strided", (weights(5, 74)[:, ::2], down.transpose(1, 2).contiguous().transpose(1, 2), up, weights(3, 5, seed=3).t()))
    yield Case("two tiles", _given(300, 1100, 2, 5))
    yield Case("no rows", _given(0, 37, 2, 3))
    yield Case("gradient", tuple(one.requires_grad_() for one in _given(5, 37, 2, 3)))


def backward_cases() -> Iterator[Case]:
    for name, given in (
        ("float32", _given(5, 37, 2, 3)),
        ("float64", _given(5, 37, 3, 2, F64)),
        ("bfloat16", _given(5, 37, 2, 3, BF16)),
        ("two tiles", _given(300, 1100, 2, 5)),
        ("no rows", _given(0, 37, 2, 3)),
    ):
        inner = reference.gating.lora_feature_gate(*given)[1]
        gradient = weights(*given[0].shape, seed=7, dtype=given[0].dtype)
        yield Case(name, (gradient, *given, inner))
        for part in ("x", "down", "up", "weight") if name in ("float32", "bfloat16") else ():
            yield Case(
                f"{name}, only {part}", (gradient, *given, inner), {f"for_{one}": one == part for one in ("x", "down", "up", "weight")}
            )


CONTRACTS = (
    Contract("lora_feature_gate", taskloom.lora_feature_gate, gate_cases, torch_products=True),
    Contract("lora_feature_gate_backward", lora_feature_gate_backward, backward_cases, torch_products=True, single=2e-6),
)

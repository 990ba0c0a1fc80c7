"""A gate of features by low-rank maps, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype, without_autocast


def _gates(inner: Tensor, up: Tensor) -> Tensor:
    """Each map's gate 2 sigmoid((x down) up), [B, L, D]."""
    maps, rank, _ = up.shape
    return 2 * torch.sigmoid(torch.einsum("blr,lrd->bld", inner.unflatten(1, (maps, rank)), up))


def _weighed(gates: Tensor, weight: Tensor) -> Tensor:
    """The sum over maps, one after the other."""
    total = torch.zeros_like(gates[:, 0])
    for place in range(gates.shape[1]):
        total = total + weight[:, place, None] * gates[:, place]
    return total


@without_autocast
def lora_feature_gate(x: Tensor, down: Tensor, up: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``x * sum_l weight_l * 2 sigmoid((x down_l) up_l)`` and the inner products ``x down``, [B, L r]."""
    dtype = accumulation_dtype(x, down, up, weight)
    values = x.to(dtype)
    inner = torch.einsum("bd,ldr->blr", values, down.to(dtype)).flatten(1)
    gate = _weighed(_gates(inner, up.to(dtype)), weight.to(dtype))
    return (values * gate).to(x.dtype), inner


@without_autocast
def lora_feature_gate_backward(
    gradient: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    weight: Tensor,
    inner: Tensor,
    for_x: bool,
    for_down: bool,
    for_up: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, down, up and weight; empty where not wanted."""
    dtype = inner.dtype
    values, g, left, right, shares = (one.to(dtype) for one in (x, gradient, down, up, weight))
    gates = _gates(inner, right)
    outer = (g * values)[:, None] * gates
    slopes = outer * shares[..., None] * (1 - gates / 2)
    thin = torch.einsum("bld,lrd->blr", slopes, right)
    dx = g * _weighed(gates, shares) + torch.einsum("blr,ldr->bd", thin, left)
    ddown = torch.einsum("bd,blr->ldr", values, thin)
    dup = torch.einsum("blr,bld->lrd", inner.reshape(thin.shape), slopes)
    return (
        _result(dx, x, for_x),
        _result(ddown, down, for_down),
        _result(dup, up, for_up),
        _result(outer.sum(2), weight, for_weight),
    )


def _result(found: Tensor, like: Tensor, wanted: bool) -> Tensor:
    return found.to(like.dtype).contiguous() if wanted else like.new_empty(0)

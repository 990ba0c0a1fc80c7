"""Experts' outputs weighed and added up per token, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype


def expert_combine(y: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """The sum over a token's slots of weight times the row of y that ``inverse`` names, slots in order; rounded once to y's dtype."""
    dtype = accumulation_dtype(y, weight)
    out = torch.zeros((*weight.shape[:-1], y.shape[1]), dtype=dtype, device=y.device)
    for slot in range(weight.shape[-1]):
        out = out + weight[..., slot, None].to(dtype) * y[inverse[..., slot].long()].to(dtype)
    return out.to(y.dtype)


def expert_combine_backward(
    gradient: Tensor, y: Tensor, weight: Tensor, inverse: Tensor, for_y: bool, for_weight: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of y and weight; empty where not wanted."""
    dtype = accumulation_dtype(y, weight)
    slopes, rows = gradient.to(dtype)[..., None, :], inverse.long()
    dy, dweight = y.new_empty(0), weight.new_empty(0)
    if for_y:
        dy = torch.empty_like(y, memory_format=torch.contiguous_format)
        dy[rows] = (weight.to(dtype)[..., None] * slopes).to(y.dtype)
    if for_weight:
        dweight = (slopes * y[rows].to(dtype)).sum(-1).to(weight.dtype)
    return dy, dweight

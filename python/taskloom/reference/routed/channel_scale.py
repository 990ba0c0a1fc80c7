"""Channels scaled by sample, in a window of them, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.reference.routed.windows import out_mask

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
}


def _slope(inner: Tensor, activation: str) -> Tensor:
    """The activation's derivative."""
    if activation == "relu":
        return (inner > 0).to(inner.dtype)
    if activation == "gelu":
        density = torch.exp(-0.5 * inner * inner) / math.sqrt(2 * math.pi)
        slope: Tensor = torch.special.ndtr(inner) + inner * density
        return slope
    if activation == "silu":
        gate = torch.sigmoid(inner)
        return gate * (1 + inner * (1 - gate))
    return torch.ones_like(inner)


def _inner(
    x: Tensor, scale: Tensor, bias: Tensor | None, start: Tensor | None, width: int, widths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The window, x in it, and the activation's argument; zeros outside."""
    dtype = accumulation_dtype(x, scale, bias)
    inside = out_mask(len(x), x.shape[1], start, width, widths, x)[..., None]
    masked = torch.where(inside, x.to(dtype), 0)
    inner = masked * scale.to(dtype)[..., None]
    if bias is not None:
        inner = inner + bias.to(dtype)[:, None]
    return inside, masked, inner


def channel_scale(
    x: Tensor, scale: Tensor, bias: Tensor | None, start: Tensor | None, width: int, widths: Tensor | None, activation: str
) -> Tensor:
    """Act(x scale + bias) inside of the window and 0 outside, for x [N, C, S], scale [N, C] and bias [C]."""
    inside, _, inner = _inner(x, scale, bias, start, width, widths)
    return torch.where(inside, ACTIVATIONS[activation](inner), 0).to(x.dtype)


def channel_scale_backward(
    gradient: Tensor,
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    start: Tensor | None,
    width: int,
    widths: Tensor | None,
    activation: str,
    for_x: bool,
    for_scale: bool,
    for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, scale and bias; empty where not wanted."""
    inside, masked, inner = _inner(x, scale, bias, start, width, widths)
    slopes = torch.where(inside, gradient.to(inner.dtype) * _slope(inner, activation), 0)
    none = x.new_empty(0)
    dx = (slopes * scale.to(inner.dtype)[..., None]).to(x.dtype) if for_x else none
    dscale = (slopes * masked).sum(2).to(scale.dtype) if for_scale else scale.new_empty(0)
    dbias = slopes.sum((0, 2)).to(bias.dtype) if for_bias and bias is not None else none
    return dx, dscale, dbias

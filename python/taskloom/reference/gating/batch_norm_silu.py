"""Batch normalisation of stacked experts with an activation behind it, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"none": lambda x: x, "relu": torch.relu, "silu": torch.nn.functional.silu}


def _slope(inner: Tensor, activation: str) -> Tensor:
    """The activation's derivative."""
    if activation == "relu":
        return (inner > 0).to(inner.dtype)
    if activation == "silu":
        gate = torch.sigmoid(inner)
        return gate * (1 + inner * (1 - gate))
    return torch.ones_like(inner)


def _affine(normal: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    inner = normal if weight is None else normal * weight.to(normal.dtype)
    return inner if bias is None else inner + bias.to(normal.dtype)


def batch_norm_silu(
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Act((z - mean) / sqrt(var + eps) * weight + bias), with the batch's statistics or running ones; and these, the variance biased."""
    dtype = accumulation_dtype(z, weight, bias, running_mean, running_var)
    values = z.to(dtype)
    if running_mean is not None and running_var is not None:
        mean, var = running_mean.to(dtype, copy=True), running_var.to(dtype, copy=True)
    else:
        mean = values.mean(0)
        var = (values - mean).square().mean(0)
    normal = (values - mean) / torch.sqrt(var + eps)
    return ACTIVATIONS[activation](_affine(normal, weight, bias)).to(z.dtype), mean, var


def batch_norm_silu_backward(
    gradient: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    running: bool,
    eps: float,
    activation: str,
    for_z: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of z, weight and bias; empty where not wanted or not there."""
    dtype = mean.dtype
    rstd = 1 / torch.sqrt(var + eps)
    normal = (z.to(dtype) - mean) * rstd
    slopes = gradient.to(dtype) * _slope(_affine(normal, weight, bias), activation)
    plain, times_normal = slopes.sum(0), (slopes * normal).sum(0)
    apart = slopes if running else slopes - (plain + normal * times_normal) / len(z)
    dz = (apart * (rstd if weight is None else rstd * weight.to(dtype))).to(z.dtype).contiguous()
    return (
        dz if for_z else z.new_empty(0),
        z.new_empty(0) if weight is None else times_normal.to(weight.dtype) if for_weight else weight.new_empty(0),
        z.new_empty(0) if bias is None else plain.to(bias.dtype) if for_bias else bias.new_empty(0),
    )

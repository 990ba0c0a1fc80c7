"""Normalisation of a prefix of a layer's channels, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype


def _grouped(values: Tensor, groups: int) -> Tensor:
    """Values as [outer, statistics, inner]: a batch's statistics lie along its channels, a sample's along its groups."""
    return values.reshape(values.shape[0], groups, -1)


def _per_channel(values: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A vector of the whole layer's channels, its prefix, to be multiplied with x."""
    return None if values is None else values[: x.shape[1]].to(dtype).reshape(1, -1, *(1,) * (x.dim() - 2))


def _normalised(x: Tensor, mean: Tensor, var: Tensor, kind: str, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(x - mean) * rstd`` as [N, statistics, ...] and rstd, which is to be multiplied with it."""
    if kind == "batch":
        mean, var = mean[None, :, None], var[None, :, None]
        values = x.to(dtype).reshape(*x.shape[:2], -1)
    else:
        mean, var = mean[..., None], var[..., None]
        values = _grouped(x.to(dtype), mean.shape[1])
    scale = torch.rsqrt(var + eps)
    return (values - mean) * scale, scale


def prefix_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    groups: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(x - mean) / sqrt(var + eps) * weight[:c] + bias[:c]``, where ``relu`` its positive part, with mean and (biased) var.

    x [N, c, ...]; weight, bias and the running statistics [C], C >= c. Statistics: of each channel of the batch, [c] (or the running
    ones), or of each sample's groups of channels, [N, groups].
    """
    dtype = accumulation_dtype(x, weight, bias, running_mean, running_var)
    if kind != "batch":
        var, mean = torch.var_mean(_grouped(x.to(dtype), groups), 2, correction=0)
    elif running_mean is not None and running_var is not None:
        mean, var = running_mean[: x.shape[1]].to(dtype, copy=True), running_var[: x.shape[1]].to(dtype, copy=True)
    else:
        var, mean = torch.var_mean(x.to(dtype).transpose(0, 1).reshape(x.shape[1], -1), 1, correction=0)
    y = _normalised(x, mean, var, kind, eps, dtype)[0].reshape(x.shape)
    scale, shift = _per_channel(weight, x, dtype), _per_channel(bias, x, dtype)
    y = y if scale is None else y * scale
    y = y if shift is None else y + shift
    return (y.relu() if relu else y).to(x.dtype), mean, var


def prefix_norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    kind: str,
    running: bool,
    eps: float,
    relu: bool,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, weight and bias (zero from c on); ``running`` statistics are constants, others depend on x."""
    dtype = mean.dtype
    normalised, scale = _normalised(x, mean, var, kind, eps, dtype)
    multiplier, shift = _per_channel(weight, x, dtype), _per_channel(bias, x, dtype)
    g, flat = gradient.to(dtype), normalised.reshape(x.shape)
    if relu:
        y = flat if multiplier is None else flat * multiplier
        g = torch.where((y if shift is None else y + shift) <= 0, 0.0, g)
    others = [dim for dim in range(x.dim()) if dim != 1]
    found: list[Tensor] = []
    if needed[0]:
        inner = (g if multiplier is None else g * multiplier).reshape(normalised.shape)
        if not running:
            dims = [0, 2] if kind == "batch" else [2]
            inner = inner - inner.mean(dims, keepdim=True) - normalised * (inner * normalised).mean(dims, keepdim=True)
        found.append((inner * scale).reshape(x.shape).to(x.dtype))
    for one, part, wanted in ((weight, (g * flat), needed[1]), (bias, g, needed[2])):
        if wanted and one is not None:
            whole = torch.zeros_like(one)
            whole[: x.shape[1]] = part.sum(others)
            found.append(whole)
    return found

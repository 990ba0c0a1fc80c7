"""prefix_norm on a CPU: torch's own statistics and normalisations, on a prefix of weight and bias."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from taskloom.ops.routed._prefix_checks import empty_result, is_channels_last
from taskloom.reference.arithmetic import accumulation_dtype, without_autocast


def _prefix(values: Tensor | None, channels: int, dtype: torch.dtype) -> Tensor | None:
    return None if values is None else values[:channels].to(dtype)


def _vector(values: Tensor | None, x: Tensor, dtype: torch.dtype, missing: float) -> Tensor:
    """The prefix of a vector; one is always given, because its dtype is that of the statistics of 16-bit values."""
    found = _prefix(values, x.shape[1], dtype)
    return x.new_full((x.shape[1],), missing, dtype=dtype) if found is None else found


def _normalised(values: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Values by given statistics: a batch's are [c], a sample's [N, groups]."""
    if mean.dim() == 1:
        return torch.native_batch_norm(values, weight, bias, mean, var, False, 0.0, eps)[0]
    channels = values.shape[1]
    scale = torch.rsqrt(var + eps).repeat_interleave(channels // mean.shape[1], 1)
    mean = mean.repeat_interleave(channels // mean.shape[1], 1)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
    shape = (*scale.shape, *(1,) * (values.dim() - 2))
    return torch.addcmul(shift.view(shape), values, scale.view(shape))


@without_autocast
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
    """Torch's normalisation, which takes 16-bit values with vectors of float32 on a CPU, and the positive part in place."""
    dtype, channels = accumulation_dtype(x, weight, bias, running_mean, running_var), x.shape[1]
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    # Without a copy where torch takes x as it is.
    values = (x if x.is_cpu and dtype == torch.float32 else x.to(dtype)).contiguous(memory_format=layout)
    vectors = _vector(weight, x, dtype, 1.0), _vector(bias, x, dtype, 0.0)
    if kind == "batch" and running_mean is not None and running_var is not None:
        mean, var = running_mean[:channels].to(dtype, copy=True), running_var[:channels].to(dtype, copy=True)
        y = torch.native_batch_norm(values, *vectors, mean, var, False, 0.0, eps)[0]
    else:
        if kind == "batch":
            y, mean, rstd = torch.native_batch_norm(values, *vectors, None, None, True, 0.0, eps)
        else:
            y, mean, rstd = torch.native_group_norm(values, *vectors, x.shape[0], channels, math.prod(x.shape[2:]), groups, eps)
        var = rstd.pow(-2).sub_(eps).clamp_(min=0)
    if relu:
        y.relu_()
    # Where a size is 1, a layout has many strides.
    usual = y.dtype == x.dtype and 1 not in x.shape and y.is_contiguous(memory_format=layout)
    return (y if usual else empty_result(x, x.shape).copy_(y)), mean, var


@without_autocast
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
    """The gradients by torch's own backwards of the two kinds."""
    dtype, channels = mean.dtype, x.shape[1]
    values, g = x.to(dtype).contiguous(), gradient.to(dtype).contiguous()
    multiplier = _prefix(weight, channels, dtype)
    if relu:
        y = _normalised(values, multiplier, _prefix(bias, channels, dtype), mean, var, eps)
        g = torch.ops.aten.threshold_backward(g, y, 0)
    rstd, mask = torch.rsqrt(var + eps), [bool(one) for one in needed]
    if kind == "batch":
        found = torch.ops.aten.native_batch_norm_backward(g, values, multiplier, mean, var, mean, rstd, not running, eps, mask)
    else:
        sizes = (x.shape[0], channels, math.prod(x.shape[2:]), mean.shape[1])
        # Torch finds no gradient of a bias without a weight.
        factors = _vector(weight, x, dtype, 1.0)
        found = torch.ops.aten.native_group_norm_backward(g, values, mean, rstd, factors, *sizes, mask)
    results = [found[0].to(x.dtype).contiguous()] if needed[0] else []
    for one, part, wanted in ((weight, found[1], needed[1]), (bias, found[2], needed[2])):
        if wanted and one is not None:
            whole = one.new_zeros(one.shape)
            whole[:channels].copy_(part)
            results.append(whole)
    return results

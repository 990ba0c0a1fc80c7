"""prefix_norm on a CPU: torch's own statistics and normalisations, on a prefix of weight and bias."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taskloom.ops.routed._prefix_checks import empty_result
from taskloom.ops.routed._prefix_products import outside_autocast
from taskloom.reference.arithmetic import accumulation_dtype


def _prefix(values: Tensor | None, channels: int, dtype: torch.dtype) -> Tensor | None:
    return None if values is None else values[:channels].to(dtype)


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


@outside_autocast
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
    """One pass for the statistics, one to normalise, and one in place for the positive part."""
    dtype = accumulation_dtype(x, weight, bias, running_mean, running_var)
    channels, values = x.shape[1], x.to(dtype)
    if kind != "batch":
        var, mean = torch.var_mean(values.reshape(x.shape[0], groups, -1), 2, correction=0)
    elif running_mean is not None and running_var is not None:
        mean, var = running_mean[:channels].to(dtype, copy=True), running_var[:channels].to(dtype, copy=True)
    else:
        var, mean = torch.var_mean(values, [dim for dim in range(x.dim()) if dim != 1], correction=0)
    y = _normalised(values, _prefix(weight, channels, dtype), _prefix(bias, channels, dtype), mean, var, eps)
    if relu:
        y.relu_()
    out = empty_result(x, x.shape)
    return (y if y.dtype == x.dtype and y.stride() == out.stride() else out.copy_(y)), mean, var


@outside_autocast
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
        sizes = (x.shape[0], channels, values[0, 0].numel() if values.numel() else 0, mean.shape[1])
        found = torch.ops.aten.native_group_norm_backward(g, values, mean, rstd, multiplier, *sizes, mask)
    results = [found[0].to(x.dtype).contiguous()] if needed[0] else []
    for one, part, wanted in ((weight, found[1], needed[1]), (bias, found[2], needed[2])):
        if wanted and one is not None:
            whole = one.new_zeros(one.shape)
            whole[:channels].copy_(part)
            results.append(whole)
    return results

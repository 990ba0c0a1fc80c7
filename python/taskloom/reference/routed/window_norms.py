"""Norms of channel windows, in plain torch: channels outside of a sample's window count as zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.reference.routed.windows import window_mask


def _moments(masked: Tensor, dims: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor]:
    mean = masked.mean(dims, keepdim=True)
    return mean, (((masked - mean) ** 2).mean(dims, keepdim=True) + eps).rsqrt()


def _input_gradient(
    slopes: Tensor, normal: Tensor, rstd: Tensor, for_mean: Tensor | None, for_rstd: Tensor | None, inside: Tensor, dims: tuple[int, ...]
) -> Tensor:
    """The gradient of a norm's input from that of its normalised values, and from those of the mean and 1 / deviation."""
    count = slopes.numel() // max(rstd.numel(), 1)
    plain, times_normal = slopes.mean(dims, keepdim=True), (slopes * normal).mean(dims, keepdim=True)
    if for_mean is not None:
        plain = plain - for_mean.reshape(rstd.shape) / (rstd * count)
    if for_rstd is not None:
        times_normal = times_normal + for_rstd.reshape(rstd.shape) * rstd / count
    return torch.where(inside, rstd * (slopes - plain - normal * times_normal), 0)


def window_layer_norm(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    start: Tensor,
    width: int,
    widths: Tensor | None,
    eps: float,
    outside: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """LN(m x) (1 + scale) + shift for x [N, P, C] and shift, scale [N, C]; with it mean and 1 / deviation, [N, P].

    Without ``outside`` the result is 0 outside of the window.
    """
    dtype = accumulation_dtype(x, shift, scale)
    inside = window_mask(len(x), x.shape[2], start, width, widths)[:, None]
    masked = torch.where(inside, x.to(dtype), 0)
    mean, rstd = _moments(masked, (2,), eps)
    y = (masked - mean) * rstd
    if scale is not None:
        y = y * (1 + scale.to(dtype)[:, None])
    if shift is not None:
        y = y + shift.to(dtype)[:, None]
    return (y if outside else torch.where(inside, y, 0)).to(x.dtype), mean[..., 0], rstd[..., 0]


def window_layer_norm_backward(
    gradient: Tensor,
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    start: Tensor,
    width: int,
    widths: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    for_mean: Tensor | None,
    for_rstd: Tensor | None,
    outside: bool,
    for_x: bool,
    for_modulation: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, shift and scale; empty where not wanted."""
    inside = window_mask(len(x), x.shape[2], start, width, widths)[:, None]
    g = gradient.to(mean.dtype)
    if not outside:
        g = torch.where(inside, g, 0)
    masked = torch.where(inside, x.to(mean.dtype), 0)
    normal = (masked - mean[..., None]) * rstd[..., None]
    slopes = g if scale is None else g * (1 + scale.to(mean.dtype)[:, None])
    none = x.new_empty(0)
    dx = _input_gradient(slopes, normal, rstd[..., None], for_mean, for_rstd, inside, (2,)).to(x.dtype) if for_x else none
    dshift = g.sum(1).to(shift.dtype) if for_modulation and shift is not None else none
    dscale = (g * normal).sum(1).to(scale.dtype) if for_modulation and scale is not None else none
    return dx, dshift, dscale


def _per_channel(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if values is None else values.to(dtype)[:, None]


def _grouped(per_group: Tensor, channels: int) -> Tensor:
    """[N, G] as [N, C, 1]: each group's value at its channels."""
    return per_group.repeat_interleave(channels // per_group.shape[1], 1)[..., None]


def window_group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    start: Tensor,
    width: int,
    widths: Tensor | None,
    eps: float,
    outside: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """SiLU(GN(m x) weight + bias) for x [N, C, S] and weight, bias [C]; with it mean and 1 / deviation, [N, G].

    Without ``outside`` the result is 0 outside of the window.
    """
    dtype = accumulation_dtype(x, weight, bias)
    samples, channels, places = x.shape
    inside = window_mask(samples, channels, start, width, widths)[..., None]
    masked = torch.where(inside, x.to(dtype), 0).reshape(samples, groups, channels // groups, places)
    mean, rstd = _moments(masked, (2, 3), eps)
    inner = ((masked - mean) * rstd).reshape(x.shape)
    factor, addend = _per_channel(weight, dtype), _per_channel(bias, dtype)
    if factor is not None:
        inner = inner * factor
    if addend is not None:
        inner = inner + addend
    y = torch.nn.functional.silu(inner)
    return (y if outside else torch.where(inside, y, 0)).to(x.dtype), mean[..., 0, 0], rstd[..., 0, 0]


def window_group_norm_silu_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    start: Tensor,
    width: int,
    widths: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    for_mean: Tensor | None,
    for_rstd: Tensor | None,
    outside: bool,
    for_x: bool,
    for_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias; empty where not wanted."""
    samples, channels, places = x.shape
    inside = window_mask(samples, channels, start, width, widths)[..., None]
    masked = torch.where(inside, x.to(mean.dtype), 0)
    normal = (masked - _grouped(mean, channels)) * _grouped(rstd, channels)
    factor, addend = _per_channel(weight, mean.dtype), _per_channel(bias, mean.dtype)
    inner = normal if factor is None else normal * factor
    inner = inner if addend is None else inner + addend
    gate = inner.sigmoid()
    slopes = gradient.to(mean.dtype) * gate * (1 + inner * (1 - gate))
    if not outside:
        slopes = torch.where(inside, slopes, 0)
    none = x.new_empty(0)
    dweight = (slopes * normal).sum((0, 2)).to(weight.dtype) if for_affine and weight is not None else none
    dbias = slopes.sum((0, 2)).to(bias.dtype) if for_affine and bias is not None else none
    if not for_x:
        return none, dweight, dbias
    shape = (samples, groups, channels // groups, places)
    slopes = slopes if factor is None else slopes * factor
    parts = (slopes.reshape(shape), normal.reshape(shape), rstd[..., None, None])
    dx = _input_gradient(*parts, for_mean, for_rstd, inside.reshape(*shape[:3], 1), (2, 3))
    return dx.reshape(x.shape).to(x.dtype), dweight, dbias


def window_norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    start: Tensor,
    width: int,
    widths: Tensor | None,
    eps: float,
) -> Tensor:
    """The linear map of :func:`window_layer_norm`'s rows [N, P, C], all channels multiplied, rounded once."""
    dtype = accumulation_dtype(x, shift, scale)
    y = window_layer_norm(x.to(dtype), shift, scale, start, width, widths, eps)[0]
    return torch.nn.functional.linear(y, weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)


def window_norm_conv2d(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    start: Tensor,
    width: int,
    widths: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    eps: float,
) -> Tensor:
    """The convolution of :func:`window_group_norm_silu`'s maps [N, C, H, W], all channels multiplied, rounded once."""
    dtype = accumulation_dtype(x, norm_weight, norm_bias)
    flat = x.flatten(2).to(dtype)
    y = window_group_norm_silu(flat, norm_weight, norm_bias, groups, start, width, widths, eps)[0].reshape(x.shape)
    added = None if bias is None else bias.to(dtype)
    return torch.nn.functional.conv2d(y, weight.to(dtype), added, stride, padding, dilation).to(x.dtype)

"""Layers that run on a prefix of their channels, in plain torch: a prefix of the weight is sliced and the dense layer is run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype


def _prefix(weight: Tensor, outputs: int, inputs: int, groups: int) -> tuple[Tensor, int]:
    """The part of a convolution's weight that a prefix uses, and its groups; grouped layers keep the channels of a group."""
    if groups == 1:
        return weight[:outputs, :inputs], 1
    return weight[:outputs], inputs // weight.shape[1]


def _spread(part: Tensor, like: Tensor) -> Tensor:
    """A gradient of a prefix as one of the whole: zeros outside, in the whole's dtype."""
    whole = torch.zeros_like(like)
    whole[tuple(slice(size) for size in part.shape)] = part.to(like.dtype)
    return whole


def _wanted(found: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor]:
    return [one for one, wanted in zip(found, needed, strict=True) if wanted and one is not None]


def prefix_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out_features: int | None = None) -> Tensor:
    """Y = x weight[:out, :in]^T + bias[:out], rounded once; x [..., in], weight [O, C], bias [O]."""
    dtype = accumulation_dtype(x)
    y = x.to(dtype) @ weight[:out_features, : x.shape[-1]].to(dtype).T
    if bias is not None:
        y = y + bias[:out_features].to(dtype)
    return y.to(x.dtype)


def prefix_linear_backward(gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, needed: Sequence[bool]) -> list[Tensor]:
    """Gradients of x [N, in], and of weight [O, C] and bias [O]: zero outside the prefix."""
    dtype = accumulation_dtype(x)
    g, rows = gradient.to(dtype), x.to(dtype)
    found = (
        (g @ weight[: g.shape[1], : x.shape[1]].to(dtype)).to(x.dtype),
        _spread(g.T @ rows, weight),
        None if bias is None else _spread(g.sum(0), bias),
    )
    return _wanted(found, needed)


def prefix_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The convolution of x [N, in, H, W] with weight[:out, :in], rounded once; ``groups`` are those of the whole layer."""
    dtype = accumulation_dtype(x)
    part, active = _prefix(weight, out_channels, x.shape[1], groups)
    offset = None if bias is None else bias[:out_channels].to(dtype)
    y = torch.nn.functional.conv2d(x.to(dtype), part.to(dtype), offset, list(stride), list(padding), list(dilation), active)
    return y.to(x.dtype)


def prefix_conv2d_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, and of weight and bias: zero outside the prefix."""
    dtype = accumulation_dtype(x)
    part, active = _prefix(weight, gradient.shape[1], x.shape[1], groups)
    g = gradient.to(dtype)
    for_x, for_weight, _ = torch.ops.aten.convolution_backward(
        g, x.to(dtype), part.to(dtype), None, stride, padding, dilation, False, [0, 0], active, [True, True, False]
    )
    found = (for_x.to(x.dtype), _spread(for_weight, weight), None if bias is None else _spread(g.sum((0, 2, 3)), bias))
    return _wanted(found, needed)


def ragged_prefix_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_channels: Tensor,
    out_channels: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    zero_tail: bool,
) -> Tensor:
    """Every sample of x [N, C, H, W] with its own prefixes, one after the other; [N, O, H', W'], zeros from out_channels[n] on.

    (The zeros are there without ``zero_tail`` too, which only says that they need not be.)
    """
    rows = []
    for place, (inputs, outputs) in enumerate(zip(in_channels.tolist(), out_channels.tolist(), strict=True)):
        y = prefix_conv2d(x[place : place + 1, :inputs], weight, bias, outputs, stride, padding, dilation, 1)
        rows.append(torch.nn.functional.pad(y, (0, 0, 0, 0, 0, weight.shape[0] - outputs)))
    return torch.cat(rows) if rows else prefix_conv2d(x, weight[:, : x.shape[1]], bias, weight.shape[0], stride, padding, dilation, 1)


def ragged_prefix_conv2d_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_channels: Tensor,
    out_channels: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x (zero from in_channels[n] on), weight and bias: the sums of the samples' own."""
    dtype = accumulation_dtype(x)
    wide = weight.to(dtype)
    for_x, for_weight = torch.zeros_like(x), torch.zeros_like(wide)
    offset = None if bias is None else bias.to(dtype)
    for_bias = None if offset is None else torch.zeros_like(offset)
    for place, (inputs, outputs) in enumerate(zip(in_channels.tolist(), out_channels.tolist(), strict=True)):
        g, own = gradient[place : place + 1, :outputs].to(dtype), x[place : place + 1, :inputs].to(dtype)
        found = prefix_conv2d_backward(g, own, wide, offset, stride, padding, dilation, 1, (True, True, bias is not None))
        for_x[place, :inputs] = found[0][0].to(x.dtype)
        for_weight += found[1]
        if for_bias is not None:
            for_bias += found[2]
    last = None if for_bias is None or bias is None else for_bias.to(bias.dtype)
    return _wanted((for_x, for_weight.to(weight.dtype), last), needed)

"""A convolution that sees a window of each sample's channels, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import grad

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.reference.routed.windows import out_mask, window_mask


def window_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: Tensor,
    width: int,
    widths: Tensor | None,
    out_start: Tensor | None,
    out_width: int,
    out_widths: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The convolution of m x, plus bias, where the output's window is, 0 elsewhere, rounded once to x's dtype.

    x [N, C, H, W], weight [O, C, kh, kw], bias [O]; m [N, C] is 1 in each sample's window and 0 outside, whatever x holds there.
    """
    dtype = accumulation_dtype(x, weight, bias)
    seen = window_mask(len(x), x.shape[1], start, width, widths)[:, :, None, None]
    made = out_mask(len(x), len(weight), out_start, out_width, out_widths, x)[:, :, None, None]
    values = x.to(dtype).masked_fill(~seen, 0)
    wide_bias = None if bias is None else bias.to(dtype)
    y = torch.nn.functional.conv2d(values, weight.to(dtype), wide_bias, tuple(stride), tuple(padding), tuple(dilation))
    return y.masked_fill(~made, 0).to(x.dtype)


def window_conv2d_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    start: Tensor,
    width: int,
    widths: Tensor | None,
    out_start: Tensor | None,
    out_width: int,
    out_widths: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, weight and bias, of each where ``needed`` says so; x's is 0 outside the windows."""
    dtype = accumulation_dtype(gradient, x, weight)
    outside = ~window_mask(len(x), x.shape[1], start, width, widths)[:, :, None, None]
    made = out_mask(len(x), len(weight), out_start, out_width, out_widths, x)[:, :, None, None]
    back = gradient.to(dtype).masked_fill(~made, 0)
    geometry = (tuple(stride), tuple(padding), tuple(dilation))
    found: list[Tensor] = []
    if needed[0]:
        for_x = grad.conv2d_input(list(x.shape), weight.to(dtype), back, *geometry)
        found.append(for_x.masked_fill(outside, 0).to(x.dtype))
    if needed[1]:
        values = x.to(dtype).masked_fill(outside, 0)
        found.append(grad.conv2d_weight(values, list(weight.shape), back, *geometry).to(weight.dtype))
    if needed[2]:
        found.append(back.sum((0, 2, 3)).to(weight.dtype))
    return found

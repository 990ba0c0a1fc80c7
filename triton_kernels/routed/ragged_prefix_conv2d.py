"""ragged_prefix_conv2d: one launch for samples of different prefixes, whose tiles read their own numbers of channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taskloom.ops.routed import _ragged_products
from taskloom.triton_kernels.routed import conv_gradients
from taskloom.triton_kernels.routed.prefix_conv2d import convolve


def _checked(op: str, name: str, widths: Tensor, most: int) -> Tensor:
    """Widths as the kernels read them; the host does not wait for the device to have looked at them."""
    torch._assert_async(((widths >= 1) & (widths <= most)).all(), f"{op}: {name}: expected values from 1 to {most}")
    return widths.contiguous()


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
    """Launch :func:`taskloom.ragged_prefix_conv2d`; tiles past a sample's outputs cost a store of zeros, with or without ``zero_tail``."""
    op = "ragged_prefix_conv2d"
    widths = _checked(op, "in_channels", in_channels, x.shape[1]), _checked(op, "out_channels", out_channels, weight.shape[0])
    return convolve(x, weight, bias, widths, weight.shape[0], (stride, padding, dilation), weight.shape[0])


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
    """Launch :func:`taskloom.ops.routed.ragged_prefix_conv2d_backward`."""
    if gradient.numel() == 0:
        given = (in_channels, out_channels, stride, padding, dilation, needed)
        return _ragged_products.ragged_prefix_conv2d_backward(gradient, x, weight, bias, *given)
    widths = in_channels.contiguous(), out_channels.contiguous()
    return conv_gradients.gradients(gradient, x, weight, bias, widths, (stride, padding, dilation), needed)

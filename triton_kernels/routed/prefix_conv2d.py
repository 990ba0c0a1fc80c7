"""prefix_conv2d and its ragged form: an implicit matrix product of pixels and a prefix of the weight, which is read by stride."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from taskloom.ops.routed import _prefix_products
from taskloom.ops.routed._prefix_checks import empty_result, output_size
from taskloom.triton_kernels.launch import launch
from taskloom.triton_kernels.masked.entries import store_entries, widened
from taskloom.triton_kernels.routed import conv_gradients
from taskloom.triton_kernels.routed.prefix_tiles import (
    active,
    constants_of,
    given,
    operand,
    patches,
    pixel_rows,
    taps,
    tiles_for,
    whole_rows,
)


@triton.jit
def prefix_conv2d_kernel(
    x,
    weight,
    bias,
    out,
    in_channels,
    out_channels,
    inputs,
    outputs,
    most,
    rows,
    size,
    across,
    height,
    width,
    x_sample,
    x_channel,
    x_row,
    x_column,
    w_output,
    w_channel,
    w_row,
    w_column,
    b_output,
    y_sample,
    y_channel,
    y_row,
    y_column,
    KY: tl.constexpr,
    KX: tl.constexpr,
    STEP_Y: tl.constexpr,
    STEP_X: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    APART_Y: tl.constexpr,
    APART_X: tl.constexpr,
    RAGGED: tl.constexpr,
    BIASED: tl.constexpr,
    EXACT: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A tile of pixels and output channels, of which ``most`` are stored: those past the active ones as zeros."""
    tile = tl.program_id(0)
    sample, pixel, inside = pixel_rows(tile, size, rows, RAGGED, ROWS)
    active_in = active(in_channels, inputs, tile, size, RAGGED, ROWS)
    active_out = active(out_channels, outputs, tile, size, RAGGED, ROWS)
    row, column = pixel // across, pixel % across
    output = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    live = output < active_out
    # A tile without an active output has nothing to sum.
    total = tl.where(tl.program_id(1) * COLUMNS < active_out, active_in * (KY * KX), 0)
    summed = tl.zeros((ROWS, COLUMNS), dtype=tl.float64 if WIDE else tl.float32)
    start = 0
    while start < total:
        depth = start + tl.arange(0, DEPTH)
        known = depth < total
        channel, ky, kx = taps(depth, KX, KY * KX)
        values = patches(
            x, sample, row, column, inside, channel, ky, kx, known, height, width, x_sample, x_channel, x_row, x_column,
            STEP_Y, STEP_X, TOP, LEFT, APART_Y, APART_X,
        )  # fmt: skip
        places = output[None, :] * w_output + channel[:, None] * w_channel + (ky * w_row + kx * w_column)[:, None]
        factors = tl.load(weight + places, mask=known[:, None] & live[None, :], other=0)
        summed += tl.dot(operand(values, EXACT, WIDE), operand(factors, EXACT, WIDE), input_precision="ieee", out_dtype=summed.dtype)
        start += DEPTH
    if BIASED:
        summed += widened(tl.load(bias + output * b_output, mask=live, other=0), WIDE)[None, :]
    summed = tl.where(live[None, :], summed, 0.0)
    places = (sample * y_sample + row.to(tl.int64) * y_row + column.to(tl.int64) * y_column)[:, None] + output[None, :] * y_channel
    store_entries(out, places, summed, inside[:, None] & (output < most)[None, :])


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    widths: tuple[Tensor, Tensor] | None,
    outputs: int,
    steps: tuple[Sequence[int], Sequence[int], Sequence[int]],
    most: int,
) -> Tensor:
    """The convolution with the same prefix for all samples, or with ``widths``, the input and output channels of each."""
    height, width = output_size("prefix_conv2d", x, weight, *steps)
    out = empty_result(x, (x.shape[0], most, height, width))
    if out.numel() == 0:
        return out
    ragged, size = widths is not None, height * width
    tiles = tiles_for(size if ragged else x.shape[0] * size, most, x.shape[1] * weight.shape[2] * weight.shape[3])
    rows = whole_rows(x.shape[0], size, tiles, ragged)
    # Tensors that are not there are never read.
    ins, outs = widths or (x, x)
    offset = weight if bias is None else bias
    launch(
        prefix_conv2d_kernel,
        (triton.cdiv(rows, tiles.rows), triton.cdiv(most, tiles.columns)),
        given(x),
        given(weight),
        given(offset),
        given(out),
        ins if ragged else given(x),
        outs if ragged else given(x),
        x.shape[1],
        outputs,
        most,
        rows,
        size,
        width,
        x.shape[2],
        x.shape[3],
        *x.stride(),
        *weight.stride(),
        offset.stride(0),
        *out.stride(),
        RAGGED=ragged,
        BIASED=bias is not None,
        **constants_of(x, weight, steps),
        **tiles.constants(),
    )
    return out


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
    """Launch :func:`taskloom.prefix_conv2d`; the prefix of a grouped weight is contiguous, and torch's convolution copies nothing."""
    if groups > 1:
        return _prefix_products.prefix_conv2d(x, weight, bias, out_channels, stride, padding, dilation, groups)
    return convolve(x, weight, bias, None, out_channels, (stride, padding, dilation), out_channels)


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
    """Launch :func:`taskloom.ops.routed.prefix_conv2d_backward`."""
    if groups > 1 or gradient.numel() == 0:
        return _prefix_products.prefix_conv2d_backward(gradient, x, weight, bias, stride, padding, dilation, groups, needed)
    return conv_gradients.gradients(gradient, x, weight, bias, None, (stride, padding, dilation), needed)

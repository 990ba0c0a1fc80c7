"""Gradients of prefix convolutions: of x, a product over output channels; of the weight, sums over pixels with one writer each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.triton_kernels.launch import INTERPRETED, launch
from taskloom.triton_kernels.masked.entries import store_entries
from taskloom.triton_kernels.routed.prefix_tiles import (
    Tiles,
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

Steps = tuple[Sequence[int], Sequence[int], Sequence[int]]
Widths = tuple[Tensor, Tensor] | None

# Programs that keep a large GPU busy, and rows that are worth one of them.
_PROGRAMS, _LEAST_ROWS = 512, 2048


@triton.jit
def input_gradient_kernel(
    gradient,
    weight,
    out,
    in_channels,
    out_channels,
    inputs,
    outputs,
    rows,
    size,
    across,
    height,
    width,
    g_sample,
    g_channel,
    g_row,
    g_column,
    w_output,
    w_channel,
    w_row,
    w_column,
    KY: tl.constexpr,
    KX: tl.constexpr,
    STEP_Y: tl.constexpr,
    STEP_X: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    APART_Y: tl.constexpr,
    APART_X: tl.constexpr,
    RAGGED: tl.constexpr,
    EXACT: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A tile of x's pixels and channels: the sum over output channels and taps that reach it; zeros past the active channels."""
    tile = tl.program_id(0)
    sample, pixel, inside = pixel_rows(tile, size, rows, RAGGED, ROWS)
    active_in = active(in_channels, inputs, tile, size, RAGGED, ROWS)
    active_out = active(out_channels, outputs, tile, size, RAGGED, ROWS)
    top, left = pixel // across + TOP, pixel % across + LEFT
    channel = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    live = channel < active_in
    total = tl.where(tl.program_id(1) * COLUMNS < active_in, active_out * (KY * KX), 0)
    summed = tl.zeros((ROWS, COLUMNS), dtype=tl.float64 if WIDE else tl.float32)
    start = 0
    while start < total:
        depth = start + tl.arange(0, DEPTH)
        known = depth < total
        output, ky, kx = taps(depth, KX, KY * KX)
        y = top[:, None] - ky[None, :] * APART_Y
        z = left[:, None] - kx[None, :] * APART_X
        read = inside[:, None] & known[None, :] & (y >= 0) & (z >= 0) & (y % STEP_Y == 0) & (z % STEP_X == 0)
        y, z = y // STEP_Y, z // STEP_X
        read = read & (y < height) & (z < width)
        places = (sample * g_sample)[:, None] + (output * g_channel)[None, :] + y.to(tl.int64) * g_row + z.to(tl.int64) * g_column
        values = tl.load(gradient + places, mask=read, other=0)
        places = output[:, None] * w_output + channel[None, :] * w_channel + (ky * w_row + kx * w_column)[:, None]
        factors = tl.load(weight + places, mask=known[:, None] & live[None, :], other=0)
        summed += tl.dot(operand(values, EXACT, WIDE), operand(factors, EXACT, WIDE), input_precision="ieee", out_dtype=summed.dtype)
        start += DEPTH
    summed = tl.where(live[None, :], summed, 0.0)
    places = (sample * inputs)[:, None] * size + channel[None, :] * size + pixel[:, None]
    store_entries(out, places, summed, inside[:, None] & (channel < inputs)[None, :])


@triton.jit
def weight_gradient_kernel(
    gradient,
    x,
    out,
    in_channels,
    out_channels,
    inputs,
    outputs,
    rows,
    size,
    across,
    height,
    width,
    share,
    tiles,
    g_sample,
    g_channel,
    g_row,
    g_column,
    x_sample,
    x_channel,
    x_row,
    x_column,
    KY: tl.constexpr,
    KX: tl.constexpr,
    STEP_Y: tl.constexpr,
    STEP_X: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    APART_Y: tl.constexpr,
    APART_X: tl.constexpr,
    RAGGED: tl.constexpr,
    EXACT: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A tile of outputs and of places along a weight's row: the sum over ``share`` tiles of pixels, in order."""
    output = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    depth = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH)
    channel, ky, kx = taps(depth, KX, KY * KX)
    summed = tl.zeros((COLUMNS, DEPTH), dtype=tl.float64 if WIDE else tl.float32)
    tile = tl.program_id(2) * share
    last = tl.minimum(tile + share, tiles)
    while tile < last:
        sample, pixel, inside = pixel_rows(tile, size, rows, RAGGED, ROWS)
        in_outputs = output < active(out_channels, outputs, tile, size, RAGGED, ROWS)
        in_inputs = channel < active(in_channels, inputs, tile, size, RAGGED, ROWS)
        row, column = pixel // across, pixel % across
        places = sample * g_sample + row.to(tl.int64) * g_row + column.to(tl.int64) * g_column
        places = (output * g_channel)[:, None] + places[None, :]
        back = tl.load(gradient + places, mask=in_outputs[:, None] & inside[None, :], other=0)
        values = patches(
            x, sample, row, column, inside, channel, ky, kx, in_inputs, height, width, x_sample, x_channel, x_row, x_column,
            STEP_Y, STEP_X, TOP, LEFT, APART_Y, APART_X,
        )  # fmt: skip
        summed += tl.dot(operand(back, EXACT, WIDE), operand(values, EXACT, WIDE), input_precision="ieee", out_dtype=summed.dtype)
        tile += 1
    length = inputs * (KY * KX)
    places = (tl.program_id(2).to(tl.int64) * outputs + output)[:, None] * length + depth[None, :]
    store_entries(out, places, summed, (output < outputs)[:, None] & (depth < length)[None, :])


def _input_gradient(gradient: Tensor, x: Tensor, weight: Tensor, widths: Widths, steps: Steps) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ragged, size = widths is not None, x.shape[2] * x.shape[3]
    taps_of = weight.shape[2] * weight.shape[3]
    tiles = tiles_for(size if ragged else x.shape[0] * size, x.shape[1], gradient.shape[1] * taps_of)
    rows = whole_rows(x.shape[0], size, tiles, ragged)
    launch(
        input_gradient_kernel,
        (triton.cdiv(rows, tiles.rows), triton.cdiv(x.shape[1], tiles.columns)),
        given(gradient),
        given(weight),
        given(out),
        *(widths or (given(x), given(x))),
        x.shape[1],
        gradient.shape[1],
        rows,
        size,
        x.shape[3],
        gradient.shape[2],
        gradient.shape[3],
        *gradient.stride(),
        *weight.stride(),
        RAGGED=ragged,
        **constants_of(x, weight, steps),
        **tiles.constants(),
    )
    return out


def _weight_gradient(gradient: Tensor, x: Tensor, weight: Tensor, widths: Widths, steps: Steps) -> Tensor:
    """Partial sums of shares of the rows, added in order: the same bits on every run."""
    ragged, size = widths is not None, gradient.shape[2] * gradient.shape[3]
    outputs, inputs, length = gradient.shape[1], x.shape[1], x.shape[1] * weight.shape[2] * weight.shape[3]
    tiles = tiles_for(size if ragged else x.shape[0] * size, outputs, length)
    constants = constants_of(x, weight, steps)
    if not INTERPRETED:
        # What is not multiplied by tensor cores is held in registers, all rows of a tile at once.
        tiles = Tiles(16 if constants["EXACT"] else 32, tiles.columns, 64)
    rows = whole_rows(x.shape[0], size, tiles, ragged)
    all_tiles = triton.cdiv(rows, tiles.rows)
    programs = triton.cdiv(outputs, tiles.columns) * triton.cdiv(length, tiles.depth)
    splits = max(1, min(_PROGRAMS // programs, rows // _LEAST_ROWS))
    share = triton.cdiv(all_tiles, splits)
    splits = triton.cdiv(all_tiles, share)
    partial = torch.empty((splits, outputs, length), dtype=accumulation_dtype(x), device=x.device)
    launch(
        weight_gradient_kernel,
        (triton.cdiv(outputs, tiles.columns), triton.cdiv(length, tiles.depth), splits),
        given(gradient),
        given(x),
        partial,
        *(widths or (given(x), given(x))),
        inputs,
        outputs,
        rows,
        size,
        gradient.shape[3],
        x.shape[2],
        x.shape[3],
        share,
        all_tiles,
        *gradient.stride(),
        *x.stride(),
        RAGGED=ragged,
        **constants,
        **tiles.constants(),
    )
    whole = weight.new_zeros(weight.shape)
    whole[:outputs, :inputs].copy_(partial.sum(0).view(outputs, inputs, *weight.shape[2:]))
    return whole


def _bias_gradient(gradient: Tensor, bias: Tensor, widths: Widths) -> Tensor:
    sums = gradient.sum((2, 3), dtype=accumulation_dtype(gradient))
    if widths is not None:
        sums = torch.where(torch.arange(gradient.shape[1], device=gradient.device) < widths[1][:, None], sums, 0)
    whole = bias.new_zeros(bias.shape)
    whole[: gradient.shape[1]].copy_(sums.sum(0))
    return whole


def gradients(
    gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, widths: Widths, steps: Steps, needed: Sequence[bool]
) -> list[Tensor]:
    """Those of x, weight and bias that are needed; with ``widths``, the input and output channels of each sample."""
    found = []
    if needed[0]:
        found.append(_input_gradient(gradient, x, weight, widths, steps))
    if needed[1]:
        found.append(_weight_gradient(gradient, x, weight, widths, steps))
    if needed[2] and bias is not None:
        found.append(_bias_gradient(gradient, bias, widths))
    return found

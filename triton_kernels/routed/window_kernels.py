"""Products of windows as implicit matrix products: a linear map is a convolution with a kernel of 1 whose positions are rows.

Entries of the inner sum are numbered as in the weight, channel by channel with the taps of a channel next to each other, so that a window
is one range of them; its first and last tile are masked. Offsets within a sample are 32-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from taskloom.triton_kernels.launch import INTERPRETED
from taskloom.triton_kernels.masked.entries import load_entries, store_entries, widened

# A counted loop, whose loads the compiler starts ahead of the products; the interpreter cannot count to what it has loaded.
COUNTED = tl.constexpr(not INTERPRETED)


@triton.jit
def window_range(start, widths, width, sample, step, widths_step, limit, WIDTHS: tl.constexpr):
    """First and last channel (exclusive) of a sample's window, within 0 and ``limit``."""
    begin = tl.load(start + sample * step).to(tl.int32)
    size = tl.load(widths + sample * widths_step).to(tl.int32) if WIDTHS else width
    return tl.maximum(begin, 0), tl.minimum(begin + size, limit)


@triton.jit
def factors(pointer, offsets, inside, EXACT: tl.constexpr, WIDE: tl.constexpr):
    """Entries as ``tl.dot`` takes them, 0 outside. EXACT: in the dtype of the arithmetic; int16 holds the bits of bfloat16 then."""
    values = tl.load(pointer + offsets, mask=inside, other=0)
    result = widened(values, WIDE) if EXACT else values
    return result


@triton.jit
def input_places(
    entry, position, across_out, down_in, across_in, channel_step, row_step, column_step, down, across, top, left, dilated_down,
    dilated_across, TAPS: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Where the input lies that an entry of the sum takes for a position of the output, and whether it lies inside."""
    channel, tap = entry // TAPS, entry % TAPS
    row = (position // across_out) * down - top + (tap // ACROSS) * dilated_down
    column = (position % across_out) * across - left + (tap % ACROSS) * dilated_across
    inside = (row >= 0) & (row < down_in) & (column >= 0) & (column < across_in)
    return channel * channel_step + row * row_step + column * column_step, inside


@triton.jit
def forward_step(
    total, inner, begin, end, x, weight, output, position, made, channels, positions, across_out, down_in, across_in, x_channel, x_row,
    x_column, down, across, top, left, dilated_down, dilated_across,
    TAPS: tl.constexpr, ACROSS: tl.constexpr, EXACT: tl.constexpr, WIDE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sum with a tile of the window's entries added, those from ``inner`` on."""
    entry = inner + tl.arange(0, BLOCK_K)
    seen = (entry >= begin * TAPS) & (entry < end * TAPS)
    left_factors = factors(weight, output[:, None] * (channels * TAPS) + entry[None, :], made[:, None] & seen[None, :], EXACT, WIDE)
    places, inside = input_places(
        entry[:, None], position[None, :], across_out, down_in, across_in, x_channel, x_row, x_column, down, across, top, left,
        dilated_down, dilated_across, TAPS, ACROSS,
    )  # fmt: skip
    inside = inside & seen[:, None] & (position < positions)[None, :]
    right_factors = factors(x, places, inside, EXACT, WIDE)
    return tl.dot(left_factors, right_factors, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def window_forward_kernel(
    x, weight, bias, y, start, widths, out_start, out_widths, width, out_width, start_step, widths_step, out_step, out_widths_step,
    channels, outputs, positions, across_out, down_in, across_in, x_sample, x_channel, x_row, x_column, y_sample, y_channel, y_position,
    down, across, top, left, dilated_down, dilated_across, tiles,
    TAPS: tl.constexpr, ACROSS: tl.constexpr, BIAS: tl.constexpr, WIDTHS: tl.constexpr, OUT: tl.constexpr, OUT_WIDTHS: tl.constexpr,
    EXACT: tl.constexpr, WIDE: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of outputs by positions of one sample: weight[:, window] times the window's columns, plus bias; 0 outside the out window."""
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    position = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    output = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    begin, end = window_range(start, widths, width, sample, start_step, widths_step, channels, WIDTHS)
    first_out, last_out = 0, outputs
    if OUT:
        first_out, last_out = window_range(out_start, out_widths, out_width, sample, out_step, out_widths_step, outputs, OUT_WIDTHS)
    made = (output >= first_out) & (output < last_out)
    if (tl.program_id(1) * BLOCK_O >= last_out) | ((tl.program_id(1) + 1) * BLOCK_O <= first_out):
        end = begin
    total = tl.zeros((BLOCK_O, BLOCK_P), dtype=tl.float64 if WIDE else tl.float32)
    first = begin * TAPS // BLOCK_K * BLOCK_K
    if COUNTED:
        for inner in range(first, end * TAPS, BLOCK_K):
            total = forward_step(
                total, inner, begin, end, x + sample * x_sample, weight, output, position, made, channels, positions, across_out, down_in,
                across_in, x_channel, x_row, x_column, down, across, top, left, dilated_down, dilated_across, TAPS, ACROSS, EXACT, WIDE,
                BLOCK_K,
            )  # fmt: skip
    else:
        while first < end * TAPS:
            total = forward_step(
                total, first, begin, end, x + sample * x_sample, weight, output, position, made, channels, positions, across_out, down_in,
                across_in, x_channel, x_row, x_column, down, across, top, left, dilated_down, dilated_across, TAPS, ACROSS, EXACT, WIDE,
                BLOCK_K,
            )  # fmt: skip
            first += BLOCK_K
    if BIAS:
        total += load_entries(bias, output, made, WIDE)[:, None]
    total = tl.where(made[:, None], total, 0.0)
    to = output[:, None] * y_channel + position[None, :] * y_position
    store_entries(y + sample * y_sample, to, total, (output < outputs)[:, None] & (position < positions)[None, :])


@triton.jit
def input_step(
    total, inner, last_out, tap, back, weight, channel, places, seen, met, channels, back_channel,
    TAPS: tl.constexpr, EXACT: tl.constexpr, WIDE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sum with the products of one tap and a tile of outputs added, those from ``inner`` on."""
    output = inner + tl.arange(0, BLOCK_K)
    given = output < last_out
    left_places = (output[None, :] * channels + channel[:, None]) * TAPS + tap
    left_factors = factors(weight, left_places, seen[:, None] & given[None, :], EXACT, WIDE)
    right_places = output[:, None] * back_channel + places[None, :]
    right_factors = factors(back, right_places, given[:, None] & met[None, :], EXACT, WIDE)
    return tl.dot(left_factors, right_factors, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def window_input_kernel(
    back, weight, made, start, widths, out_start, out_widths, width, out_width, start_step, widths_step, out_step, out_widths_step,
    channels, outputs, positions, across_in, down_out, across_out, back_sample, back_channel, back_row, back_column, made_sample,
    made_channel, made_position, down, across, top, left, dilated_down, dilated_across, tiles,
    TAPS: tl.constexpr, ACROSS: tl.constexpr, WIDTHS: tl.constexpr, OUT: tl.constexpr, OUT_WIDTHS: tl.constexpr,
    EXACT: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of channels by positions of one sample's input gradient; 0 outside the window."""
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    position = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin, end = window_range(start, widths, width, sample, start_step, widths_step, channels, WIDTHS)
    first_out, last_out = 0, outputs
    if OUT:
        first_out, last_out = window_range(out_start, out_widths, out_width, sample, out_step, out_widths_step, outputs, OUT_WIDTHS)
    if (tl.program_id(1) * BLOCK_C >= end) | ((tl.program_id(1) + 1) * BLOCK_C <= begin):
        last_out = first_out
    seen = (channel >= begin) & (channel < end)
    total = tl.zeros((BLOCK_C, BLOCK_P), dtype=tl.float64 if WIDE else tl.float32)
    tap = 0
    while tap < TAPS:
        row = position // across_in + top - (tap // ACROSS) * dilated_down
        column = position % across_in + left - (tap % ACROSS) * dilated_across
        met = (position < positions) & (row >= 0) & (row % down == 0) & (row // down < down_out)
        met = met & (column >= 0) & (column % across == 0) & (column // across < across_out)
        places = (row // down) * back_row + (column // across) * back_column
        if COUNTED:
            for inner in range(first_out, last_out, BLOCK_K):
                total = input_step(
                    total, inner, last_out, tap, back + sample * back_sample, weight, channel, places, seen, met, channels, back_channel,
                    TAPS, EXACT, WIDE, BLOCK_K,
                )  # fmt: skip
        else:
            inner = first_out
            while inner < last_out:
                total = input_step(
                    total, inner, last_out, tap, back + sample * back_sample, weight, channel, places, seen, met, channels, back_channel,
                    TAPS, EXACT, WIDE, BLOCK_K,
                )  # fmt: skip
                inner += BLOCK_K
        tap += 1
    to = channel[:, None] * made_channel + position[None, :] * made_position
    store_entries(made + sample * made_sample, to, total, (channel < channels)[:, None] & (position < positions)[None, :])


@triton.jit
def weight_step(
    total, inner, back, x, output, entry, given, seen, positions, across_out, down_in, across_in, back_channel, back_position, x_channel,
    x_row, x_column, down, across, top, left, dilated_down, dilated_across,
    TAPS: tl.constexpr, ACROSS: tl.constexpr, EXACT: tl.constexpr, WIDE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sum with the products of a tile of one sample's positions added, those from ``inner`` on."""
    position = inner + tl.arange(0, BLOCK_K)
    within = position < positions
    left_places = output[:, None] * back_channel + position[None, :] * back_position
    left_factors = factors(back, left_places, given[:, None] & within[None, :], EXACT, WIDE)
    places, inside = input_places(
        entry[None, :], position[:, None], across_out, down_in, across_in, x_channel, x_row, x_column, down, across, top, left,
        dilated_down, dilated_across, TAPS, ACROSS,
    )  # fmt: skip
    inside = inside & seen[None, :] & within[:, None]
    right_factors = factors(x, places, inside, EXACT, WIDE)
    return tl.dot(left_factors, right_factors, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def window_weight_kernel(
    back, x, made, start, widths, out_start, out_widths, width, out_width, start_step, widths_step, out_step, out_widths_step, samples,
    channels, outputs, positions, across_out, down_in, across_in, back_sample, back_channel, back_position, x_sample, x_channel, x_row,
    x_column, down, across, top, left, dilated_down, dilated_across,
    TAPS: tl.constexpr, ACROSS: tl.constexpr, WIDTHS: tl.constexpr, OUT: tl.constexpr, OUT_WIDTHS: tl.constexpr,
    EXACT: tl.constexpr, WIDE: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of the weight's gradient: the samples whose windows meet it are summed by one program, in their order."""
    output = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    entry = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_O, BLOCK_C), dtype=tl.float64 if WIDE else tl.float32)
    sample = tl.program_id(0).to(tl.int64) * 0
    while sample < samples:
        begin, end = window_range(start, widths, width, sample, start_step, widths_step, channels, WIDTHS)
        first_out, last_out = 0, outputs
        if OUT:
            first_out, last_out = window_range(out_start, out_widths, out_width, sample, out_step, out_widths_step, outputs, OUT_WIDTHS)
        seen, given = (entry >= begin * TAPS) & (entry < end * TAPS), (output >= first_out) & (output < last_out)
        met = (tl.program_id(1) * BLOCK_C < end * TAPS) & ((tl.program_id(1) + 1) * BLOCK_C > begin * TAPS)
        met = met & (tl.program_id(0) * BLOCK_O < last_out) & ((tl.program_id(0) + 1) * BLOCK_O > first_out)
        first = tl.where(met, 0, positions)
        if COUNTED:
            for inner in range(first, positions, BLOCK_K):
                total = weight_step(
                    total, inner, back + sample * back_sample, x + sample * x_sample, output, entry, given, seen, positions, across_out,
                    down_in, across_in, back_channel, back_position, x_channel, x_row, x_column, down, across, top, left, dilated_down,
                    dilated_across, TAPS, ACROSS, EXACT, WIDE, BLOCK_K,
                )  # fmt: skip
        else:
            while first < positions:
                total = weight_step(
                    total, first, back + sample * back_sample, x + sample * x_sample, output, entry, given, seen, positions, across_out,
                    down_in, across_in, back_channel, back_position, x_channel, x_row, x_column, down, across, top, left, dilated_down,
                    dilated_across, TAPS, ACROSS, EXACT, WIDE, BLOCK_K,
                )  # fmt: skip
                first += BLOCK_K
        sample += 1
    to = output[:, None] * (channels * TAPS) + entry[None, :]
    store_entries(made, to, total, (output < outputs)[:, None] & (entry < channels * TAPS)[None, :])

"""channel_scale and its backward: a program takes some channels, and all of their places in backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.triton_kernels.launch import INTERPRETED, flat, launch, raw
from taskloom.triton_kernels.masked.entries import divided, load_entries, store_entries
from taskloom.triton_kernels.routed.window_rows import window_tables


@triton.jit
def _activated(inner, ACTIVATION: tl.constexpr, WIDE: tl.constexpr):
    """The activation's value."""
    if ACTIVATION == "relu":
        result = tl.where(inner < 0, 0.0, inner)
    elif ACTIVATION == "gelu":
        result = inner * (0.5 + 0.5 * tl.erf(inner * 0.7071067811865476))
    elif ACTIVATION == "silu":
        result = divided(inner, 1 + tl.exp(-inner), WIDE)
    else:
        result = inner
    return result


@triton.jit
def _slope(inner, ACTIVATION: tl.constexpr, WIDE: tl.constexpr):
    """The activation's derivative."""
    if ACTIVATION == "relu":
        result = tl.where(inner > 0, 1.0, 0.0).to(inner.dtype)
    elif ACTIVATION == "gelu":
        result = 0.5 + 0.5 * tl.erf(inner * 0.7071067811865476) + inner * (0.3989422804014327 * tl.exp(-0.5 * (inner * inner)))
    elif ACTIVATION == "silu":
        gate = divided(tl.zeros_like(inner) + 1, 1 + tl.exp(-inner), WIDE)
        result = gate * (1 + inner * (1 - gate))
    else:
        result = tl.zeros_like(inner) + 1
    return result


@triton.jit
def _rows(block, lines, channels, width, start, widths, ROWS: tl.constexpr, WINDOW: tl.constexpr, WIDTHS: tl.constexpr):
    """A block of ROWS channels of all samples' as one list: places in it, channels, and which of them are in their sample's window."""
    line = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = line < lines
    sample = line // channels
    channel = line - sample * channels
    inside = present
    if WINDOW:
        low = tl.load(start + sample, mask=present, other=0).to(tl.int64)
        size = tl.load(widths + sample, mask=present, other=0).to(tl.int64) if WIDTHS else width
        inside = present & (channel >= low) & (channel < low + size)
    return line, channel, present, inside


@triton.jit
def channel_scale_kernel(
    x,
    scale,
    bias,
    start,
    widths,
    y,
    lines,
    channels,
    places,
    width,
    pieces,
    BIAS: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDTHS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The activation of scaled channels; 0 outside of the window."""
    block = tl.program_id(0) // pieces
    line, channel, present, inside = _rows(block, lines, channels, width, start, widths, ROWS, WINDOW, WIDTHS)
    place = (tl.program_id(0) % pieces).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offsets = line[:, None] * places + place[None, :]
    taken = inside[:, None] & (place < places)[None, :]
    inner = load_entries(x, offsets, taken, WIDE) * load_entries(scale, line, inside, WIDE)[:, None]
    if BIAS:
        inner += load_entries(bias, channel, inside, WIDE)[:, None]
    result = tl.where(taken, _activated(inner, ACTIVATION, WIDE), 0.0)
    store_entries(y, offsets, result, present[:, None] & (place < places)[None, :])


@triton.jit
def channel_scale_backward_kernel(
    gradient,
    x,
    scale,
    bias,
    start,
    widths,
    dx,
    for_scale,
    for_bias,
    lines,
    channels,
    places,
    width,
    BIAS: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDTHS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FOR_X: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of x, and each channel's sums over its places."""
    line, channel, present, inside = _rows(tl.program_id(0), lines, channels, width, start, widths, ROWS, WINDOW, WIDTHS)
    factors = load_entries(scale, line, inside, WIDE)[:, None]
    sums = tl.zeros([ROWS, BLOCK], tl.float64 if WIDE else tl.float32)
    times_x = tl.zeros_like(sums)
    first = 0
    while first < places:
        place = first + tl.arange(0, BLOCK)
        offsets = line[:, None] * places + place[None, :]
        taken = inside[:, None] & (place < places)[None, :]
        values = load_entries(x, offsets, taken, WIDE)
        inner = values * factors
        if BIAS:
            inner += load_entries(bias, channel, inside, WIDE)[:, None]
        slopes = load_entries(gradient, offsets, taken, WIDE) * _slope(inner, ACTIVATION, WIDE)
        slopes = tl.where(taken, slopes, 0.0)
        sums += slopes
        times_x += slopes * values
        if FOR_X:
            store_entries(dx, offsets, slopes * factors, present[:, None] & (place < places)[None, :])
        first += BLOCK
    tl.store(for_scale + line, tl.sum(times_x, axis=1), mask=present)
    tl.store(for_bias + line, tl.sum(sums, axis=1), mask=present)


def _blocks(places: int) -> dict[str, int]:
    entries = 1024 if not INTERPRETED else 1 << 14
    block = min(entries, triton.next_power_of_2(max(places, 1)))
    return {"ROWS": entries // block, "BLOCK": block}


def channel_scale(
    x: Tensor, scale: Tensor, bias: Tensor | None, start: Tensor | None, width: int, widths: Tensor | None, activation: str
) -> Tensor:
    """Launch :func:`taskloom.channel_scale`."""
    samples, channels, places = x.shape
    wide = accumulation_dtype(x, scale, bias) == torch.float64
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    values, factors = flat(x), flat(scale)
    tables = (factors, factors) if start is None else window_tables("channel_scale", samples, channels, (start, width, widths))
    constants = {"BIAS": bias is not None, "WINDOW": start is not None, "WIDTHS": widths is not None, "ACTIVATION": activation}
    blocks = _blocks(places)
    # One dimension: the others of a grid end at 65535.
    pieces = triton.cdiv(places, blocks["BLOCK"])
    grid = (triton.cdiv(samples * channels, blocks["ROWS"]) * pieces,)
    addends = factors if bias is None else flat(bias)
    sizes = (samples * channels, channels, places, width, pieces)
    launch(channel_scale_kernel, grid, values, factors, addends, *tables, raw(y), *sizes, WIDE=wide, **constants, **blocks)
    return y


def channel_scale_backward(
    gradient: Tensor,
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    start: Tensor | None,
    width: int,
    widths: Tensor | None,
    activation: str,
    for_x: bool,
    for_scale: bool,
    for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward op; the samples' sums are added up by torch, in order."""
    samples, channels, places = x.shape
    dtype = accumulation_dtype(x, scale, bias)
    dx = torch.empty(x.shape if for_x else (0,), dtype=x.dtype, device=x.device)
    sums = torch.empty((2, samples, channels), dtype=dtype, device=x.device)
    values, factors = flat(x), flat(scale)
    tables = (factors, factors) if start is None else window_tables("channel_scale_backward", samples, channels, (start, width, widths))
    constants = {"BIAS": bias is not None, "WINDOW": start is not None, "WIDTHS": widths is not None, "ACTIVATION": activation}
    blocks = _blocks(places)
    grid = (triton.cdiv(samples * channels, blocks["ROWS"]),)
    given = (flat(gradient), values, factors, factors if bias is None else flat(bias), *tables, raw(dx), sums[0], sums[1])
    sizes = (samples * channels, channels, places, width)
    launch(channel_scale_backward_kernel, grid, *given, *sizes, FOR_X=for_x, WIDE=dtype == torch.float64, **constants, **blocks)
    none = x.new_empty(0)
    dscale = torch.empty(scale.shape, dtype=scale.dtype, device=x.device).copy_(sums[0]) if for_scale else scale.new_empty(0)
    dbias = sums[1].sum(0).to(bias.dtype) if for_bias and bias is not None else none
    return dx, dscale, dbias

"""window_layer_norm and its backward: a program takes some rows of one sample, one after the other."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.triton_kernels.launch import INTERPRETED, flat, launch, raw
from taskloom.triton_kernels.masked.entries import divided, load_entries, store_entries
from taskloom.triton_kernels.routed.window_rows import square_root, window_of, window_tables

# Rows of a program: each loads the modulation once; in backward it also adds their gradients up.
FORWARD_ROWS, BACKWARD_ROWS = 4, 16


@triton.jit
def window_layer_norm_kernel(
    x,
    shift,
    scale,
    start,
    widths,
    y,
    mean,
    rstd,
    rows,
    channels,
    width,
    pieces,
    EPS: tl.constexpr,
    STEP: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    WIDTHS: tl.constexpr,
    OUTSIDE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalise and modulate STEP rows; only the window's entries are loaded."""
    sample = tl.program_id(0).to(tl.int64) // pieces
    row = (tl.program_id(0) % pieces) * STEP
    last = tl.minimum(row + STEP, rows)
    channel = tl.arange(0, BLOCK)
    present = channel < channels
    low, high = window_of(start, widths, sample, width, WIDTHS)
    inside = (channel >= low) & (channel < high)
    gain = tl.full([BLOCK], 1, tl.float64 if WIDE else tl.float32)
    if SCALE:
        gain += load_entries(scale, sample * channels + channel, present, WIDE)
    while row < last:
        place = sample * rows + row
        values = load_entries(x, place * channels + channel, inside, WIDE)
        total = tl.zeros_like(tl.sum(values, axis=0)) + channels
        middle = divided(tl.sum(values, axis=0), total, WIDE)
        apart = tl.where(present, values - middle, 0.0)
        variance = divided(tl.sum(apart * apart, axis=0), total, WIDE)
        factor = divided(tl.zeros_like(variance) + 1, square_root(variance + EPS, WIDE), WIDE)
        result = apart * factor * gain
        if SHIFT:
            result += load_entries(shift, sample * channels + channel, present, WIDE)
        if not OUTSIDE:
            result = tl.where(inside, result, 0.0)
        store_entries(y, place * channels + channel, result, present)
        tl.store(mean + place, middle)
        tl.store(rstd + place, factor)
        row += 1


@triton.jit
def window_layer_norm_backward_kernel(
    gradient,
    x,
    scale,
    start,
    widths,
    mean,
    rstd,
    for_mean,
    for_rstd,
    dx,
    sums,
    rows,
    channels,
    width,
    pieces,
    STEP: tl.constexpr,
    SCALE: tl.constexpr,
    WIDTHS: tl.constexpr,
    FOR_MEAN: tl.constexpr,
    FOR_RSTD: tl.constexpr,
    OUTSIDE: tl.constexpr,
    FOR_X: tl.constexpr,
    FOR_MODULATION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of STEP rows, and their part of those of shift and scale."""
    sample = tl.program_id(0).to(tl.int64) // pieces
    row = (tl.program_id(0) % pieces) * STEP
    last = tl.minimum(row + STEP, rows)
    channel = tl.arange(0, BLOCK)
    present = channel < channels
    low, high = window_of(start, widths, sample, width, WIDTHS)
    inside = (channel >= low) & (channel < high)
    computed = present if OUTSIDE else inside
    gain = tl.full([BLOCK], 1, tl.float64 if WIDE else tl.float32)
    if SCALE:
        gain += load_entries(scale, sample * channels + channel, present, WIDE)
    for_shift = tl.zeros_like(gain)
    for_scale = tl.zeros_like(gain)
    while row < last:
        place = sample * rows + row
        middle = tl.load(mean + place)
        factor = tl.load(rstd + place)
        slopes = load_entries(gradient, place * channels + channel, computed, WIDE)
        normal = (load_entries(x, place * channels + channel, inside, WIDE) - middle) * factor
        for_shift += slopes
        for_scale += slopes * normal
        if FOR_X:
            inner = slopes * gain
            plain = tl.sum(inner, axis=0)
            times_normal = tl.sum(inner * normal, axis=0)
            if FOR_MEAN:
                plain -= divided(tl.load(for_mean + place), factor, WIDE)
            if FOR_RSTD:
                times_normal += tl.load(for_rstd + place) * factor
            total = tl.zeros_like(plain) + channels
            result = factor * (inner - divided(plain, total, WIDE) - normal * divided(times_normal, total, WIDE))
            store_entries(dx, place * channels + channel, tl.where(inside, result, 0.0), present)
        row += 1
    if FOR_MODULATION:
        to = sums + tl.program_id(0).to(tl.int64) * 2 * channels + channel
        tl.store(to, for_shift, mask=present)
        tl.store(to + channels, for_scale, mask=present)


def _blocks(channels: int) -> dict[str, int]:
    block = triton.next_power_of_2(channels)
    return {"BLOCK": block, "num_warps": min(16, max(4, block // 512))}


def window_layer_norm(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    start: Tensor,
    width: int,
    widths: Tensor | None,
    eps: float,
    outside: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward op of :func:`taskloom.window_layer_norm`."""
    samples, rows, channels = x.shape
    dtype = accumulation_dtype(x, shift, scale)
    tables = window_tables("window_layer_norm", samples, channels, (start, width, widths))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty((samples, rows), dtype=dtype, device=x.device) for _ in range(2))
    values = flat(x)
    step = FORWARD_ROWS if not INTERPRETED else max(rows, 1)
    pieces = triton.cdiv(rows, step)
    given = [values if one is None else flat(one) for one in (shift, scale)]
    sizes = (rows, channels, width, pieces)
    constants = {"SHIFT": shift is not None, "SCALE": scale is not None, "WIDTHS": widths is not None, "OUTSIDE": outside}
    constants |= {"WIDE": dtype == torch.float64, "STEP": step, "EPS": eps}
    launch(
        window_layer_norm_kernel,
        (samples * pieces,),
        values,
        *given,
        *tables,
        raw(y),
        mean,
        rstd,
        *sizes,
        **constants,
        **_blocks(channels),
    )
    return y, mean, rstd


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
    """Launch the backward op; the parts of the sums are added up by torch, in order."""
    samples, rows, channels = x.shape
    tables = window_tables("window_layer_norm_backward", samples, channels, (start, width, widths))
    for_shift, for_scale = for_modulation and shift is not None, for_modulation and scale is not None
    dx = torch.empty(x.shape if for_x else (0,), dtype=x.dtype, device=x.device)
    step = BACKWARD_ROWS if not INTERPRETED else max(rows, 1)
    pieces = triton.cdiv(rows, step)
    wants_sums = for_shift or for_scale
    sums = torch.empty((samples, pieces, 2, channels) if wants_sums else (0,), dtype=mean.dtype, device=x.device)
    values = flat(x)
    beside = [mean.contiguous() if one is None else one.contiguous() for one in (mean, rstd, for_mean, for_rstd)]
    constants = {"SCALE": scale is not None, "WIDTHS": widths is not None, "OUTSIDE": outside, "STEP": step}
    constants |= {"FOR_MEAN": for_mean is not None, "FOR_RSTD": for_rstd is not None}
    constants |= {"FOR_X": for_x, "FOR_MODULATION": wants_sums, "WIDE": mean.dtype == torch.float64}
    launch(
        window_layer_norm_backward_kernel,
        (samples * pieces,),
        flat(gradient),
        values,
        values if scale is None else flat(scale),
        *tables,
        *beside,
        raw(dx),
        sums,
        *(rows, channels, width, pieces),
        **constants,
        **_blocks(channels),
    )
    none = x.new_empty(0)
    totals = sums.sum(1) if wants_sums else sums
    # Results of their own, not parts of the sums.
    dshift = torch.empty_like(shift, memory_format=torch.contiguous_format).copy_(totals[:, 0]) if for_shift and shift is not None else none
    dscale = torch.empty_like(scale, memory_format=torch.contiguous_format).copy_(totals[:, 1]) if for_scale and scale is not None else none
    return dx, dshift, dscale

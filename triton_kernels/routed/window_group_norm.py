"""window_group_norm_silu and its backward: a program takes one group of one sample, whose window is one run of entries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.triton_kernels.launch import INTERPRETED, flat, launch, raw
from taskloom.triton_kernels.masked.entries import divided, load_entries, store_entries
from taskloom.triton_kernels.routed.window_rows import square_root, window_of, window_tables


@triton.jit
def _group(start, widths, channels, groups, width, WIDTHS: tl.constexpr):
    """A program's sample, the channels begin .. end of its group, and the part low .. high of the sample's window among them."""
    sample = tl.program_id(0).to(tl.int64) // groups
    begin = (tl.program_id(0).to(tl.int64) % groups) * (channels // groups)
    end = begin + channels // groups
    low, high = window_of(start, widths, sample, width, WIDTHS)
    first = tl.minimum(tl.maximum(low, begin), end)
    return sample, begin, end, first, tl.maximum(tl.minimum(high, end), first)


@triton.jit
def _affine(weight, bias, channel, present, WEIGHT: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr):
    """The factors and addends of channels."""
    factors = tl.where(present, 1.0, 1.0).to(tl.float64 if WIDE else tl.float32)
    addends = tl.where(present, 0.0, 0.0).to(tl.float64 if WIDE else tl.float32)
    if WEIGHT:
        factors = load_entries(weight, channel, present, WIDE)
    if BIAS:
        addends = load_entries(bias, channel, present, WIDE)
    return factors, addends


@triton.jit
def window_group_norm_silu_kernel(
    x,
    weight,
    bias,
    start,
    widths,
    y,
    mean,
    rstd,
    channels,
    places,
    groups,
    width,
    EPS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    WIDTHS: tl.constexpr,
    OUTSIDE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalise a group and apply SiLU."""
    sample, begin, end, low, high = _group(start, widths, channels, groups, width, WIDTHS)
    origin = sample * channels * places
    entry = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64 if WIDE else tl.float32)
    first = low * places
    while first < high * places:
        sums += load_entries(x, origin + first + entry, first + entry < high * places, WIDE)
        first += BLOCK
    total = tl.zeros_like(tl.sum(sums, axis=0)) + (channels // groups) * places
    middle = divided(tl.sum(sums, axis=0), total, WIDE)
    squares = tl.zeros_like(sums)
    first = low * places
    while first < high * places:
        inside = first + entry < high * places
        apart = tl.where(inside, load_entries(x, origin + first + entry, inside, WIDE) - middle, 0.0)
        squares += apart * apart
        first += BLOCK
    zeros = ((end - begin) - (high - low)) * places
    variance = divided(tl.sum(squares, axis=0) + middle * middle * zeros, total, WIDE)
    factor = divided(tl.zeros_like(variance) + 1, square_root(variance + EPS, WIDE), WIDE)
    tl.store(mean + tl.program_id(0), middle)
    tl.store(rstd + tl.program_id(0), factor)
    first = begin * places
    while first < end * places:
        present = first + entry < end * places
        channel = (first + entry) // places
        inside = (channel >= low) & (channel < high)
        normal = (load_entries(x, origin + first + entry, inside, WIDE) - middle) * factor
        factors, addends = _affine(weight, bias, channel, present, WEIGHT, BIAS, WIDE)
        inner = normal * factors + addends
        result = divided(inner, 1 + tl.exp(-inner), WIDE)
        if not OUTSIDE:
            result = tl.where(inside, result, 0.0)
        store_entries(y, origin + first + entry, result, present)
        first += BLOCK


@triton.jit
def _inner_slopes(gradient, inner, WIDE: tl.constexpr):
    """The gradient of SiLU's argument."""
    gate = divided(tl.zeros_like(inner) + 1, 1 + tl.exp(-inner), WIDE)
    return gradient * (gate * (1 + inner * (1 - gate)))


@triton.jit
def window_group_norm_silu_backward_kernel(
    gradient,
    x,
    weight,
    bias,
    start,
    widths,
    mean,
    rstd,
    for_mean,
    for_rstd,
    dx,
    sums,
    channels,
    places,
    groups,
    width,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    WIDTHS: tl.constexpr,
    FOR_MEAN: tl.constexpr,
    FOR_RSTD: tl.constexpr,
    OUTSIDE: tl.constexpr,
    FOR_X: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each channel's sums first, then from their totals the gradient of x."""
    sample, begin, end, low, high = _group(start, widths, channels, groups, width, WIDTHS)
    origin = sample * channels * places
    entry = tl.arange(0, BLOCK)
    middle = tl.load(mean + tl.program_id(0))
    factor = tl.load(rstd + tl.program_id(0))
    plain = tl.zeros_like(middle)
    times_normal = tl.zeros_like(middle)
    channel = begin if OUTSIDE else low
    last = end if OUTSIDE else high
    if not OUTSIDE:
        other = begin
        while other < end:
            skipped = (other < low) | (other >= high)
            tl.store(sums + sample * 2 * channels + other, tl.zeros_like(middle), mask=skipped)
            tl.store(sums + (sample * 2 + 1) * channels + other, tl.zeros_like(middle), mask=skipped)
            other += 1
    while channel < last:
        factors, addends = _affine(weight, bias, channel + tl.zeros([BLOCK], tl.int64), entry < BLOCK, WEIGHT, BIAS, WIDE)
        own = tl.zeros([BLOCK], tl.float64 if WIDE else tl.float32)
        own_times_normal = tl.zeros_like(own)
        inside = (channel >= low) & (channel < high)
        first = 0
        while first < places:
            present = first + entry < places
            place = origin + channel * places + first + entry
            normal = (load_entries(x, place, present & inside, WIDE) - middle) * factor
            slopes = _inner_slopes(load_entries(gradient, place, present, WIDE), normal * factors + addends, WIDE)
            slopes = tl.where(present, slopes, 0.0)
            own += slopes
            own_times_normal += slopes * normal
            first += BLOCK
        channel_plain = tl.sum(own, axis=0)
        channel_times_normal = tl.sum(own_times_normal, axis=0)
        tl.store(sums + sample * 2 * channels + channel, channel_times_normal)
        tl.store(sums + (sample * 2 + 1) * channels + channel, channel_plain)
        one = tl.max(factors, axis=0)
        plain += one * channel_plain
        times_normal += one * channel_times_normal
        channel += 1
    if FOR_X:
        if FOR_MEAN:
            plain -= divided(tl.load(for_mean + tl.program_id(0)), factor, WIDE)
        if FOR_RSTD:
            times_normal += tl.load(for_rstd + tl.program_id(0)) * factor
        total = tl.zeros_like(plain) + (channels // groups) * places
        plain = divided(plain, total, WIDE)
        times_normal = divided(times_normal, total, WIDE)
        first = begin * places
        while first < end * places:
            present = first + entry < end * places
            channels_here = (first + entry) // places
            inside = (channels_here >= low) & (channels_here < high)
            normal = (load_entries(x, origin + first + entry, inside, WIDE) - middle) * factor
            factors, addends = _affine(weight, bias, channels_here, present, WEIGHT, BIAS, WIDE)
            slopes = _inner_slopes(load_entries(gradient, origin + first + entry, inside, WIDE), normal * factors + addends, WIDE)
            result = factor * (slopes * factors - plain - normal * times_normal)
            store_entries(dx, origin + first + entry, tl.where(inside, result, 0.0), present)
            first += BLOCK


def _blocks(entries: int) -> dict[str, int]:
    most = 1024 if not INTERPRETED else 1 << 16
    return {"BLOCK": min(most, max(16, triton.next_power_of_2(entries)))}


def window_group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    start: Tensor,
    width: int,
    widths: Tensor | None,
    eps: float,
    outside: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward op of :func:`taskloom.window_group_norm_silu`."""
    samples, channels, places = x.shape
    dtype = accumulation_dtype(x, weight, bias)
    tables = window_tables("window_group_norm_silu", samples, channels, (start, width, widths))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty((samples, groups), dtype=dtype, device=x.device) for _ in range(2))
    values = flat(x)
    given = [values if one is None else flat(one) for one in (weight, bias)]
    constants = {"WEIGHT": weight is not None, "BIAS": bias is not None, "WIDTHS": widths is not None, "OUTSIDE": outside}
    constants |= {"WIDE": dtype == torch.float64, "EPS": eps} | _blocks(channels // groups * places)
    sizes = (channels, places, groups, width)
    launch(window_group_norm_silu_kernel, (samples * groups,), values, *given, *tables, raw(y), mean, rstd, *sizes, **constants)
    return y, mean, rstd


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
    """Launch the backward op; the samples' sums are added up by torch, in order."""
    samples, channels, places = x.shape
    tables = window_tables("window_group_norm_silu_backward", samples, channels, (start, width, widths))
    dx = torch.empty(x.shape if for_x else (0,), dtype=x.dtype, device=x.device)
    sums = torch.empty((samples, 2, channels), dtype=mean.dtype, device=x.device)
    values = flat(x)
    given = [values if one is None else flat(one) for one in (weight, bias)]
    beside = [mean.contiguous() if one is None else one.contiguous() for one in (mean, rstd, for_mean, for_rstd)]
    constants = {"WEIGHT": weight is not None, "BIAS": bias is not None, "WIDTHS": widths is not None, "OUTSIDE": outside}
    constants |= {"FOR_MEAN": for_mean is not None, "FOR_RSTD": for_rstd is not None, "FOR_X": for_x}
    constants |= {"WIDE": mean.dtype == torch.float64} | _blocks(places)
    launch(
        window_group_norm_silu_backward_kernel,
        (samples * groups,),
        flat(gradient),
        values,
        *given,
        *tables,
        *beside,
        raw(dx),
        sums,
        *(channels, places, groups, width),
        **constants,
    )
    none = x.new_empty(0)
    totals = sums.sum(0)
    # Results of their own, not parts of the sums.
    dweight = torch.empty_like(weight).copy_(totals[0]) if for_affine and weight is not None else none
    dbias = torch.empty_like(bias).copy_(totals[1]) if for_affine and bias is not None else none
    return dx, dweight, dbias

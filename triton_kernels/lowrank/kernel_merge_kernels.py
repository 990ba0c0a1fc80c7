"""The passes of kernel_merge: statistics of rows, digits of magnitudes, the merge, and the gradients. Each output has one writer."""

from __future__ import annotations

import triton
import triton.language as tl

from taskloom.triton_kernels.lowrank.kernel_entries import (
    chunk_part,
    curved_tile,
    entry_tile,
    exponential,
    gate_factor,
    gradient_tile,
    load_row_stats,
    mixed_tile,
    zero_tile,
)
from taskloom.triton_kernels.masked.entries import divided, load_entries, magnitude_bits, store_entries
from taskloom.triton_kernels.masked.magnitude_ranks import DIGIT_BITS, digit_histogram

_BINS = tl.constexpr(1 << DIGIT_BITS)


@triton.jit
def places(program, SIZE: tl.constexpr):
    """Rows of a block, 64-bit."""
    return program.to(tl.int64) * SIZE + tl.arange(0, SIZE)


@triton.jit
def kernel_row_stats_kernel(a, b, coef, numbers, stats, n, m, chunks, width, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of each row i, the largest M / gamma over j and the sum of the exponentials of the differences from it."""
    i = places(tl.program_id(0), COLUMNS)
    steep = divided(1.0, tl.load(numbers + 1), WIDE)
    top = tl.sum(zero_tile(WIDE, ROWS, COLUMNS), axis=0) - float("inf")
    total = tl.zeros_like(top)
    begin = 0
    while begin < m:
        j = begin + tl.arange(0, ROWS).to(tl.int64)
        scaled = mixed_tile(a, b, coef, i, j, n, m, chunks, width, "pwl", WIDE, ROWS, COLUMNS) * steep
        scaled = tl.where((j < m)[:, None], scaled, -float("inf"))
        larger = tl.maximum(top, tl.max(scaled, axis=0))
        total = total * exponential(top - larger, WIDE) + tl.sum(exponential(scaled - larger[None, :], WIDE), axis=0)
        top = larger
        begin += ROWS
    tl.store(stats + i, top, mask=i < n)
    tl.store(stats + n + i, total, mask=i < n)


@triton.jit
def load_tile_bits(
    a,
    b,
    coef,
    numbers,
    top,
    share,
    i,
    j,
    n,
    m,
    chunks,
    width,
    KERNEL: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The bits of a tile's magnitudes in a row, and which are inside."""
    mixed = mixed_tile(a, b, coef, i, j, n, m, chunks, width, KERNEL, WIDE, ROWS, COLUMNS)
    entries = entry_tile(mixed, curved_tile(mixed, numbers, top, share, KERNEL, WIDE), numbers, KERNEL)
    inside = (j < m)[:, None] & (i < n)[None, :]
    return tl.reshape(magnitude_bits(entries, WIDE), [ROWS * COLUMNS]), tl.reshape(inside, [ROWS * COLUMNS])


@triton.jit
def kernel_digits_kernel(
    a,
    b,
    coef,
    numbers,
    stats,
    counts,
    state,
    largest,
    n,
    m,
    chunks,
    width,
    shift,
    digit_width,
    KERNEL: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add a histogram of one digit of the magnitudes' bits to counts, and find the largest bits."""
    i = places(tl.program_id(0), COLUMNS)
    top, share = load_row_stats(stats, i, n, KERNEL, WIDE)
    prefix = tl.load(state)
    total = tl.zeros([_BINS], tl.int32)
    found = tl.zeros([ROWS * COLUMNS], tl.int64 if WIDE else tl.int32)
    begin = tl.program_id(1).to(tl.int64) * ROWS
    while begin < m:
        j = begin + tl.arange(0, ROWS)
        bits, inside = load_tile_bits(a, b, coef, numbers, top, share, i, j, n, m, chunks, width, KERNEL, WIDE, ROWS, COLUMNS)
        found = tl.maximum(found, tl.where(inside, bits, 0))
        total += digit_histogram(bits, inside, prefix, shift, digit_width)
        begin += tl.num_programs(1) * ROWS
    tl.atomic_max(largest, tl.max(found, axis=0).to(tl.int64))
    tl.atomic_add(counts + tl.arange(0, _BINS), total.to(tl.int64), mask=total > 0)


@triton.jit
def kernel_next_kernel(
    a,
    b,
    coef,
    numbers,
    stats,
    state,
    least,
    n,
    m,
    chunks,
    width,
    KERNEL: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The least bits of a magnitude that are above those found."""
    i = places(tl.program_id(0), COLUMNS)
    top, share = load_row_stats(stats, i, n, KERNEL, WIDE)
    below = tl.load(state)
    none: tl.constexpr = 0x7FFFFFFFFFFFFFFF if WIDE else 0x7FFFFFFF
    found = tl.zeros([ROWS * COLUMNS], tl.int64 if WIDE else tl.int32) + none
    begin = tl.program_id(1).to(tl.int64) * ROWS
    while begin < m:
        j = begin + tl.arange(0, ROWS)
        bits, inside = load_tile_bits(a, b, coef, numbers, top, share, i, j, n, m, chunks, width, KERNEL, WIDE, ROWS, COLUMNS)
        found = tl.minimum(found, tl.where(inside & (bits.to(tl.int64) > below), bits, none))
        begin += tl.num_programs(1) * ROWS
    tl.atomic_min(least, tl.min(found, axis=0).to(tl.int64))


@triton.jit
def kernel_merge_kernel(
    a,
    b,
    coef,
    numbers,
    stats,
    threshold,
    base,
    out,
    n,
    m,
    chunks,
    width,
    KERNEL: tl.constexpr,
    GATE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[j, i] = base[j, i] + gated E[i, j]."""
    i, j = places(tl.program_id(0), COLUMNS), places(tl.program_id(1), ROWS)
    top, share = load_row_stats(stats, i, n, KERNEL, WIDE)
    mixed = mixed_tile(a, b, coef, i, j, n, m, chunks, width, KERNEL, WIDE, ROWS, COLUMNS)
    entries = entry_tile(mixed, curved_tile(mixed, numbers, top, share, KERNEL, WIDE), numbers, KERNEL)
    merged = entries * gate_factor(entries, tl.load(threshold), GATE, False)
    inside = (j < m)[:, None] & (i < n)[None, :]
    offsets = j[:, None] * n + i[None, :]
    if HAS_BASE:
        merged = load_entries(base, offsets, inside, WIDE) + merged
    store_entries(out, offsets, merged, inside)


@triton.jit
def kernel_row_dots_kernel(
    gradient,
    a,
    b,
    coef,
    numbers,
    stats,
    threshold,
    dots,
    sums,
    n,
    m,
    chunks,
    width,
    GATE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """For mixk: sum_j softmax * dE of each row i, and each program's sum of dE."""
    i = places(tl.program_id(0), COLUMNS)
    top, share = load_row_stats(stats, i, n, "mixk", WIDE)
    dot = tl.sum(zero_tile(WIDE, ROWS, COLUMNS), axis=0)
    plain = tl.zeros_like(dot).to(tl.float64)
    cut = tl.load(threshold)
    begin = 0
    while begin < m:
        j = begin + tl.arange(0, ROWS).to(tl.int64)
        mixed = mixed_tile(a, b, coef, i, j, n, m, chunks, width, "mixk", WIDE, ROWS, COLUMNS)
        soft = curved_tile(mixed, numbers, top, share, "mixk", WIDE)
        slope = gradient_tile(gradient, entry_tile(mixed, soft, numbers, "mixk"), cut, i, j, n, m, GATE, WIDE)
        dot += tl.sum(soft * slope, axis=0)
        plain += tl.sum(slope, axis=0).to(tl.float64)
        begin += ROWS
    tl.store(dots + i, dot, mask=i < n)
    tl.store(sums + tl.program_id(0), tl.sum(plain, axis=0))


@triton.jit
def pull_tile(mixed, numbers, top, share, slope, curved, dot, KERNEL: tl.constexpr, WIDE: tl.constexpr):
    """The gradient of the mixed chunks from that of the entries, and the terms of the gradients of alpha, gamma and beta."""
    zero = tl.zeros_like(mixed)
    if KERNEL == "mixk":
        steep = divided(1.0, tl.load(numbers + 1), WIDE)
        soft = tl.load(numbers) * curved * (slope - dot[None, :])
        # A row's `soft` add up to 0, so that any multiple of a row may be taken off M / gamma: the largest leaves least to cancel.
        result = slope + soft * steep, zero, soft * (mixed * steep - top[None, :]), zero
    elif KERNEL == "rbf":
        fall = tl.load(numbers) * (slope * curved)
        result = (-2.0 * tl.load(numbers + 2)) * fall, slope * curved, slope, -(fall * mixed)
    elif KERNEL == "sigmoid":
        rise = tl.load(numbers) * slope * (curved * (1.0 - curved))
        result = tl.load(numbers + 2) * rise, slope * curved, slope, rise * mixed
    else:
        result = slope, zero, zero, zero
    return result


@triton.jit
def kernel_backward_kernel(
    gradient,
    a,
    b,
    coef,
    numbers,
    stats,
    threshold,
    dots,
    out,
    sums,
    n,
    m,
    chunks,
    width,
    slices,
    KERNEL: tl.constexpr,
    GATE: tl.constexpr,
    FOR_A: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Gradients of a slice of columns of one factor, for the rows that a program owns; where FOR_A, and those of the scalars.

    ``out`` is [chunks, width, rows of the factor]; ``sums`` [programs, chunks, 4]: terms of coef, alpha, gamma and beta.
    """
    chunk = tl.program_id(1) // slices
    start = tl.program_id(1) % slices * SLICE
    i = places(tl.program_id(0), COLUMNS) if FOR_A else tl.arange(0, COLUMNS).to(tl.int64)
    j = tl.arange(0, ROWS).to(tl.int64) if FOR_A else places(tl.program_id(0), ROWS)
    columns = tl.arange(0, SLICE)
    cut = tl.load(threshold)
    # One accumulator per column of the slice and row that is owned.
    total = zero_tile(WIDE, SLICE, COLUMNS if FOR_A else ROWS)
    for_coef = tl.sum(zero_tile(WIDE, ROWS, COLUMNS), axis=0).to(tl.float64)
    for_alpha, for_gamma, for_beta = for_coef, for_coef, for_coef
    weight_of = tl.load(coef + chunk)
    begin = 0
    end = m if FOR_A else n
    while begin < end:
        top, share = load_row_stats(stats, i, n, KERNEL, WIDE)
        dot = tl.load(dots + i, mask=i < n, other=0.0) if KERNEL == "mixk" else i
        mixed = mixed_tile(a, b, coef, i, j, n, m, chunks, width, KERNEL, WIDE, ROWS, COLUMNS)
        curved = curved_tile(mixed, numbers, top, share, KERNEL, WIDE)
        slope = gradient_tile(gradient, entry_tile(mixed, curved, numbers, KERNEL), cut, i, j, n, m, GATE, WIDE)
        # Where the gradient is 0 by being outside, nothing is pulled either.
        inside = (j < m)[:, None] & (i < n)[None, :]
        pull, of_alpha, of_gamma, of_beta = pull_tile(mixed, numbers, top, share, slope, curved, dot, KERNEL, WIDE)
        weight = tl.where(inside, pull, 0.0)
        if KERNEL != "rbf" and KERNEL != "sigmoid":
            part = chunk_part(a, b, chunk, i, j, n, m, width, KERNEL, WIDE, ROWS, COLUMNS)
            if FOR_A:
                for_coef += tl.sum(weight * part, axis=0).to(tl.float64)
            weight = weight_of * weight
            if KERNEL != "linear":
                weight = tl.where(part == 0.0, 0.0, divided(weight, tl.where(part == 0.0, 1.0, part), WIDE))
        if FOR_A:
            for_alpha += tl.sum(of_alpha, axis=0).to(tl.float64)
            for_gamma += tl.sum(tl.where(inside, of_gamma, 0.0), axis=0).to(tl.float64)
            for_beta += tl.sum(of_beta, axis=0).to(tl.float64)
        k = 0
        while k < SLICE:
            present = start + k < width
            row = (chunk * width + tl.where(present, start + k, 0)).to(tl.int64)
            own = tl.load(a + row * n + i, mask=i < n, other=0.0)[None, :]
            other = tl.load(b + row * m + j, mask=j < m, other=0.0)[:, None]
            if KERNEL == "linear" or KERNEL == "sigmoid":
                term = weight * (other if FOR_A else own)
            else:
                term = weight * (own - other) if FOR_A else weight * (other - own)
            column = tl.sum(term, axis=0 if FOR_A else 1)
            total += tl.where((columns == k)[:, None], column[None, :], 0.0)
            k += 1
        begin += ROWS if FOR_A else COLUMNS
        if FOR_A:
            j += ROWS
        else:
            i += COLUMNS
    rows, own_rows = (n, i) if FOR_A else (m, j)
    column = start + columns
    offsets = (chunk * width + column).to(tl.int64)[:, None] * rows + own_rows[None, :]
    tl.store(out + offsets, total, mask=(column < width)[:, None] & (own_rows < rows)[None, :])
    if FOR_A and start == 0:
        to = sums + (tl.program_id(0).to(tl.int64) * chunks + chunk) * 4
        tl.store(to, tl.sum(for_coef, axis=0))
        tl.store(to + 1, tl.sum(for_alpha, axis=0))
        tl.store(to + 2, tl.sum(for_gamma, axis=0))
        tl.store(to + 3, tl.sum(for_beta, axis=0))

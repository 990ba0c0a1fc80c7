"""Exact ranks of magnitudes: radix histograms of the bits of |tuned - base|, 11 bits at a time, from the highest.

For each rank the search keeps, on the device, the digits found so far and how many entries are still to be taken among those that share
them. It ends with the bits of the magnitude of that rank and with how many entries that equal it are kept; rank 0 ends with all bits set
and none kept. A *cut* is the same as (bits, tie end): above it are the entries with larger bits, and those with equal bits before the
tie end, an index.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.triton_kernels.launch import INTERPRETED, entries_per_program, flat, launch, programs
from taskloom.triton_kernels.masked.entries import load_entries, magnitude_bits

DIGIT_BITS = 11
_BINS = tl.constexpr(1 << DIGIT_BITS)
# A program adds its histogram to memory once, so it should have counted more entries than there are bins.
_MOST_PROGRAMS = 1024
_SCANNED = 1 << 15
# Kernels place entries in their rows with 32 bits.
_LONGEST_ROW = (1 << 31) - 1


@triton.jit
def load_magnitudes(tuned, base, offsets, inside, HAS_BASE: tl.constexpr, WIDE: tl.constexpr):
    """The bits of |tuned - base|, or of |tuned|."""
    values = load_entries(tuned, offsets, inside, WIDE)
    if HAS_BASE:
        values -= load_entries(base, offsets, inside, WIDE)
    return magnitude_bits(values, WIDE)


@triton.jit
def digit_histogram(bits, inside, prefix, shift, width):
    """Counts of the digit at ``shift`` of the entries whose higher digits are ``prefix``."""
    digit = (bits >> shift).to(tl.int32) & ((1 << width) - 1)
    return tl.histogram(digit, _BINS, mask=inside & ((bits >> (shift + width)).to(tl.int64) == prefix))


@triton.jit
def choose_digit(counts, left, width):
    """The digit at which the entries from the highest digit down reach ``left``, and how many lie above it."""
    digits = tl.arange(0, _BINS)
    from_top = tl.cumsum(counts, 0, reverse=True)
    digit = tl.sum(((from_top >= left) & (digits < (1 << width))).to(tl.int64), axis=0) - 1
    above = tl.sum(tl.where(digits > digit, counts, 0), axis=0)
    return digit, above


@triton.jit
def count_digits_kernel(
    tuned, base, counts, state, numel, stride, shift, width, HAS_BASE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """Add a histogram of one digit to counts[rank], over every ``stride``-th block of the tensor."""
    rank = tl.program_id(1)
    prefix = tl.load(state + 2 * rank)
    total = tl.zeros([_BINS], tl.int32)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    while start < numel:
        offsets = start + tl.arange(0, BLOCK)
        inside = offsets < numel
        total += digit_histogram(load_magnitudes(tuned, base, offsets, inside, HAS_BASE, WIDE), inside, prefix, shift, width)
        start += stride
    tl.atomic_add(counts + rank * _BINS + tl.arange(0, _BINS), total.to(tl.int64), mask=total > 0)


@triton.jit
def choose_digit_kernel(counts, state, width):
    """Move each rank's state, (digits found, entries still to be taken), on by the digit that was counted."""
    rank = tl.program_id(0)
    left = tl.load(state + 2 * rank + 1)
    digit, above = choose_digit(tl.load(counts + rank * _BINS + tl.arange(0, _BINS)), left, width)
    tl.store(state + 2 * rank, (tl.load(state + 2 * rank) << width) | digit)
    tl.store(state + 2 * rank + 1, left - above)


@triton.jit
def count_equal_kernel(tuned, base, state, counts, numel, HAS_BASE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """How many entries of each program's equal the magnitude of each rank: counts[rank, program]."""
    rank = tl.program_id(1)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    bits = load_magnitudes(tuned, base, offsets, inside, HAS_BASE, WIDE).to(tl.int64)
    equal = inside & (bits == tl.load(state + 2 * rank))
    tl.store(counts + rank.to(tl.int64) * tl.num_programs(0) + tl.program_id(0), tl.sum(equal.to(tl.int64), axis=0))


@triton.jit
def tie_end_kernel(
    tuned, base, state, places, before, cuts, numel, blocks, HAS_BASE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """The cut of each rank: ``places`` is the block with its last kept equal entry, ``before`` how many lie in the blocks before."""
    rank = tl.program_id(0)
    threshold = tl.load(state + 2 * rank)
    kept = tl.load(state + 2 * rank + 1)
    place = tl.load(places + rank)
    offsets = tl.minimum(place, blocks - 1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    equal = inside & (load_magnitudes(tuned, base, offsets, inside, HAS_BASE, WIDE).to(tl.int64) == threshold)
    count = tl.load(before + rank) + tl.cumsum(equal.to(tl.int64), 0)
    end = tl.max(tl.where(equal & (count == kept), offsets + 1, 0), axis=0)
    # Nothing is kept, or more than there are: then all of them.
    end = tl.where(kept <= 0, 0, tl.where(place >= blocks, numel, end))
    tl.store(cuts + 2 * rank, threshold)
    tl.store(cuts + 2 * rank + 1, end)


@triton.jit
def row_ranks_kernel(
    tuned,
    base,
    ranks,
    state,
    cuts,
    length,
    HAS_BASE: tl.constexpr,
    WIDE: tl.constexpr,
    TIES: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row and one of its ranks: state[row, rank], and where TIES cuts[row, rank], by passes over the row."""
    row = tl.program_id(0).to(tl.int64)
    place = row * tl.num_programs(1) + tl.program_id(1)
    left = tl.load(ranks + tl.program_id(1))
    prefix = left * 0
    shift = TOP
    width = 31 - TOP
    if WIDE:
        width = 63 - TOP
    while width > 0:
        counts = tl.zeros([_BINS], tl.int32)
        start = row * 0
        while start < length:
            offsets = start + tl.arange(0, BLOCK)
            inside = offsets < length
            bits = load_magnitudes(tuned, base, row * length + offsets, inside, HAS_BASE, WIDE)
            counts += digit_histogram(bits, inside, prefix, shift, width)
            start += BLOCK
        digit, above = choose_digit(counts.to(tl.int64), left, width)
        prefix = (prefix << width) | digit
        left -= above
        width = tl.minimum(11, shift)
        shift -= width
    tl.store(state + 2 * place, prefix)
    tl.store(state + 2 * place + 1, left)
    if TIES:
        end = left * 0
        seen = left * 0
        start = row * 0
        while start < length:
            offsets = start + tl.arange(0, BLOCK)
            inside = offsets < length
            bits = load_magnitudes(tuned, base, row * length + offsets, inside, HAS_BASE, WIDE)
            equal = inside & (bits.to(tl.int64) == prefix)
            count = seen + tl.cumsum(equal.to(tl.int64), 0)
            end = tl.maximum(end, tl.max(tl.where(equal & (count <= left), offsets + 1, 0), axis=0))
            seen += tl.sum(equal.to(tl.int64), axis=0)
            start += BLOCK
        tl.store(cuts + 2 * place, prefix)
        tl.store(cuts + 2 * place + 1, end)


def digit_places(wide: bool) -> list[tuple[int, int]]:
    """(shift, width) of the digits of a magnitude's bits, the highest first."""
    bits, places = 63 if wide else 31, []
    while bits > 0:
        width = min(DIGIT_BITS, bits)
        bits -= width
        places.append((bits, width))
    return places


def find_ranks(tuned: Sequence[Tensor], base: Sequence[Tensor], ranks: Sequence[int], wide: bool) -> Tensor:
    """(bits, equal kept) of each rank of all tensors as one vector: int64 of shape ``[ranks, 2]``, without waiting for the device."""
    device = tuned[0].device
    state = torch.tensor([[0, rank] for rank in ranks], dtype=torch.int64, device=device).reshape(-1, 2)
    pairs = [(flat(one), flat(base[place]) if base else None) for place, one in enumerate(tuned)]
    for shift, width in digit_places(wide):
        counts = torch.zeros(len(state), 1 << DIGIT_BITS, dtype=torch.int64, device=device)
        for values, origin in pairs:
            numel = values.numel()
            block = entries_per_program(numel, 2048)
            count = min(programs(numel, block), _MOST_PROGRAMS)
            constants = {"HAS_BASE": origin is not None, "WIDE": wide, "BLOCK": block}
            arguments = (values, values if origin is None else origin, counts, state, numel, count * block, shift, width)
            launch(count_digits_kernel, (count, len(state)), *arguments, num_warps=8, **constants)
        launch(choose_digit_kernel, (len(state),), counts, state, width)
    return state


def cuts_of(tuned: Tensor, base: Tensor | None, state: Tensor, wide: bool) -> Tensor:
    """The cuts (bits, tie end) of one tensor from (bits, equal kept), both of shape ``[ranks, 2]``."""
    values, numel = flat(tuned), tuned.numel()
    origin = values if base is None else flat(base)
    if numel == 0:
        return torch.stack([state[:, 0], torch.zeros_like(state[:, 1])], dim=1)
    block = entries_per_program(numel, 2048)
    blocks = programs(numel, block)
    constants = {"HAS_BASE": base is not None, "WIDE": wide, "BLOCK": block}
    counts = torch.empty(len(state), blocks, dtype=torch.int64, device=values.device)
    launch(count_equal_kernel, (blocks, len(state)), values, origin, state, counts, numel, **constants)
    ends = counts.cumsum(1)
    places = torch.searchsorted(ends, state[:, 1:].contiguous())
    inside = places.clamp(max=blocks - 1)
    before = (ends - counts).gather(1, inside)
    cuts = torch.empty_like(state)
    launch(tie_end_kernel, (len(state),), values, origin, state, places, before, cuts, numel, blocks, num_warps=8, **constants)
    return cuts


def find_row_ranks(tuned: Tensor, base: Tensor | None, ranks: Sequence[int], wide: bool, *, ties: bool) -> tuple[Tensor, Tensor]:
    """(bits, equal kept) and, with ``ties``, cuts of every row's ranks: int64 of shape ``[rows, ranks, 2]``; tie ends count in the row."""
    shape = tuned.shape or (1,)
    length = shape[-1]
    if length > _LONGEST_ROW:
        raise RuntimeError(f"tuned: expected rows of at most {_LONGEST_ROW} entries, got {length}")
    rows = tuned.numel() // length if length else torch.Size(shape[:-1]).numel()
    values = flat(tuned)
    places = torch.tensor(list(ranks), dtype=torch.int64, device=tuned.device)
    state = torch.empty(rows, len(places), 2, dtype=torch.int64, device=tuned.device)
    cuts = torch.empty_like(state) if ties else state
    block = min(triton.next_power_of_2(max(length, 256)), _SCANNED if INTERPRETED else 1024)
    shift, _ = digit_places(wide)[0]
    constants = {"HAS_BASE": base is not None, "WIDE": wide, "TIES": ties, "TOP": shift, "BLOCK": block}
    arguments = (values, values if base is None else flat(base), places, state, cuts, length)
    launch(row_ranks_kernel, (rows, len(places)), *arguments, num_warps=8, **constants)
    return state, cuts

"""magnitude_mask."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.reference.masked.magnitude import magnitude_bits
from taskloom.triton_kernels.launch import entries_per_program, flat, launch, programs
from taskloom.triton_kernels.masked.entries import program_offsets, store_bits
from taskloom.triton_kernels.masked.magnitude_ranks import cuts_of, find_ranks, find_row_ranks, load_magnitudes


@triton.jit
def above_cut(bits, index, threshold, tie_end):
    """Whether entries are above a cut: larger, or equal and before the tie end."""
    return (bits > threshold) | ((bits == threshold) & (index < tie_end))


@triton.jit
def between_cuts(bits, offsets, cuts, inside, row_length, BY_ROW: tl.constexpr):
    """Whether entries lie in a band: above its end rank's cut and not above its first one's; cuts[row, (begin, end), 2]."""
    if BY_ROW:
        # One division of 64 bits for the program and 32-bit ones for its entries: rows are shorter than 2^31.
        length = tl.full([], row_length, tl.uint32)
        first = tl.program_id(0).to(tl.int64) * offsets.shape[0]
        first_row = first // row_length
        place = (first - first_row * row_length).to(tl.uint32) + (offsets - first).to(tl.uint32)
        row = place // length
        index = (place - row * length).to(tl.int64)
        own = cuts + 4 * (first_row + row.to(tl.int64))
        outer = above_cut(bits, index, tl.load(own + 2, mask=inside, other=0), tl.load(own + 3, mask=inside, other=0))
        inner = above_cut(bits, index, tl.load(own, mask=inside, other=0), tl.load(own + 1, mask=inside, other=0))
    else:
        outer = above_cut(bits, offsets, tl.load(cuts + 2), tl.load(cuts + 3))
        inner = above_cut(bits, offsets, tl.load(cuts), tl.load(cuts + 1))
    return outer & (inner == 0)


@triton.jit
def magnitude_mask_kernel(
    tuned,
    base,
    cuts,
    out,
    numel,
    row_length,
    PACKED: tl.constexpr,
    BY_ROW: tl.constexpr,
    HAS_BASE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The entries between the cuts, as bytes or bits."""
    offsets = program_offsets(BLOCK)
    inside = offsets < numel
    bits = load_magnitudes(tuned, base, offsets, inside, HAS_BASE, WIDE).to(tl.int64)
    kept = inside & between_cuts(bits, offsets, cuts, inside, row_length, BY_ROW)
    if PACKED:
        store_bits(out, tl.program_id(0).to(tl.int64) * BLOCK, numel, kept, BLOCK)
    else:
        tl.store(out + offsets, kept.to(tl.uint8), mask=inside)


def band_cuts(
    tuned: Tensor,
    base: Tensor | None,
    ranks: tuple[int, int],
    by_row: bool,
    threshold: Tensor | None,
    equal_kept: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The cuts of a band's (begin, end), found or given: int64 of shape ``[2, 2]``, by row ``[rows, 2, 2]``; ``dtype`` ranks."""
    wide = dtype == torch.float64
    if threshold is not None and equal_kept is not None:
        given = torch.stack([magnitude_bits(threshold.to(dtype)), equal_kept], dim=1)
        return cuts_of(tuned, base, given, wide)
    # Above rank 0 lies nothing: there is no need to look for it.
    searched = ranks[1:] if ranks[0] == 0 else ranks
    if by_row:
        _, cuts = find_row_ranks(tuned, base, searched, wide, ties=True)
    else:
        cuts = cuts_of(tuned, base, find_ranks([tuned], [] if base is None else [base], searched, wide), wide)
    if ranks[0] == 0:
        nothing = torch.tensor([(1 << (63 if wide else 31)) - 1, 0], dtype=torch.int64, device=cuts.device)
        cuts = torch.cat([nothing.expand(cuts[..., :1, :].shape), cuts], dim=-2)
    return cuts


def magnitude_mask(
    tuned: Tensor,
    base: Tensor | None,
    rank_begin: int,
    rank_end: int,
    by_row: bool,
    threshold: Tensor | None,
    equal_kept: Tensor | None,
    packed: bool,
) -> Tensor:
    """Launch :func:`taskloom.magnitude_mask`."""
    values, numel = flat(tuned), tuned.numel()
    dtype = accumulation_dtype(tuned, base)
    cuts = band_cuts(tuned, base, (rank_begin, rank_end), by_row, threshold, equal_kept, dtype)
    shape, kind = ((numel + 7) // 8, torch.uint8) if packed else (tuned.shape, torch.bool)
    mask = torch.empty(shape, dtype=kind, device=tuned.device)
    block = entries_per_program(numel)
    constants = {"PACKED": packed, "BY_ROW": by_row, "HAS_BASE": base is not None, "WIDE": dtype == torch.float64, "BLOCK": block}
    row_length = tuned.shape[-1] if tuned.dim() else 1
    arguments = (values, values if base is None else flat(base), cuts, mask.view(torch.uint8), numel, row_length)
    launch(magnitude_mask_kernel, (programs(numel, block),), *arguments, **constants)
    return mask

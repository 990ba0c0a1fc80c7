"""magnitude_threshold, magnitude_histogram."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.reference.masked.magnitude import values_of_bits
from taskloom.triton_kernels.launch import entries_per_program, flat, launch, programs
from taskloom.triton_kernels.masked.entries import program_offsets
from taskloom.triton_kernels.masked.magnitude_ranks import find_ranks, find_row_ranks, load_magnitudes

_BINS = 1 << 16


@triton.jit
def magnitude_histogram_kernel(
    tuned, base, counts, scalars, numel, shift, TOP: tl.constexpr, HAS_BASE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """Count the 16-bit digit at ``shift`` of the entries whose higher digits are scalars[0] (of all, if it is the TOP digit)."""
    offsets = program_offsets(BLOCK)
    inside = offsets < numel
    bits = load_magnitudes(tuned, base, offsets, inside, HAS_BASE, WIDE).to(tl.int64)
    if not TOP:
        inside &= (bits >> (shift + 16)) == tl.load(scalars)
    tl.atomic_add(counts + ((bits >> shift) & 0xFFFF), tl.full([BLOCK], 1, tl.int64), mask=inside)


def magnitude_threshold(tuned: Sequence[Tensor], base: Sequence[Tensor], rank: Sequence[int], by_row: bool) -> tuple[Tensor, Tensor]:
    """Launch :func:`taskloom.magnitude_threshold`."""
    dtype = accumulation_dtype(*tuned, *base)
    wide = dtype == torch.float64
    if by_row:
        state, _ = find_row_ranks(tuned[0], base[0] if base else None, rank, wide, ties=False)
    else:
        state = find_ranks(tuned, base, rank, wide)
    bits, equal_kept = (state[..., part].clone(memory_format=torch.contiguous_format) for part in (0, 1))
    return values_of_bits(bits, dtype), equal_kept


def magnitude_histogram(tuned: Tensor, base: Tensor | None, shift: int, prefix: int, wide: bool) -> Tensor:
    """Launch :func:`taskloom.magnitude_histogram`; integer counts are the same in whatever order they are added."""
    counts = torch.zeros(_BINS, dtype=torch.int64, device=tuned.device)
    values, numel = flat(tuned), tuned.numel()
    block = entries_per_program(numel)
    higher = torch.full((1,), prefix, dtype=torch.int64, device=tuned.device)
    constants = {"TOP": shift + 16 == (64 if wide else 32), "HAS_BASE": base is not None, "WIDE": wide, "BLOCK": block}
    arguments = (values, values if base is None else flat(base), counts, higher, numel, shift)
    launch(magnitude_histogram_kernel, (programs(numel, block),), *arguments, **constants)
    return counts

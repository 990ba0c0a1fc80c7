"""masked_compress, masked_restore: the bits of entries are moved, so elements are taken as integers of their size."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.triton_kernels.launch import entries_per_program, flat, launch, programs
from taskloom.triton_kernels.masked.entries import load_bits, program_offsets

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def count_set_kernel(packed, counts, numel, BLOCK: tl.constexpr):
    """How many entries of each program's are set."""
    offsets = program_offsets(BLOCK)
    tl.store(counts + tl.program_id(0), tl.sum(load_bits(packed, offsets, offsets < numel).to(tl.int64)))


@triton.jit
def masked_compress_kernel(values, packed, places, compressed, numel, BLOCK: tl.constexpr):
    """Set entries to their place: how many are set before the program (``places``) and before the entry in it."""
    offsets = program_offsets(BLOCK)
    chosen = load_bits(packed, offsets, offsets < numel)
    before = tl.cumsum(chosen.to(tl.int32), 0) - 1
    entries = tl.load(values + offsets, mask=chosen, other=0)
    tl.store(compressed + tl.load(places + tl.program_id(0)) + before, entries, mask=chosen)


@triton.jit
def masked_restore_kernel(compressed, packed, places, base, out, numel, BLOCK: tl.constexpr):
    """Set entries from their place, all others from base."""
    offsets = program_offsets(BLOCK)
    inside = offsets < numel
    chosen = load_bits(packed, offsets, inside)
    before = tl.cumsum(chosen.to(tl.int32), 0) - 1
    stored = tl.load(compressed + tl.load(places + tl.program_id(0)) + before, mask=chosen, other=0)
    under = tl.load(base + offsets, mask=inside & (chosen == 0), other=0)
    tl.store(out + offsets, tl.where(chosen, stored, under), mask=inside)


def _integers(tensor: Tensor, name: str) -> Tensor:
    size = tensor.element_size()
    if size not in _INTEGERS:
        raise RuntimeError(f"{name}: expected elements of 1, 2, 4 or 8 bytes, got {size}")
    return tensor.contiguous().view(_INTEGERS[size])


def _places(packed: Tensor, numel: int, block: int) -> tuple[Tensor, int]:
    """How many entries are set before each program, and in all; the latter waits for the device."""
    counts = torch.empty(programs(numel, block), dtype=torch.int64, device=packed.device)
    launch(count_set_kernel, (len(counts),), packed, counts, numel, BLOCK=block)
    ends = counts.cumsum(0)
    return ends - counts, int(ends[-1]) if len(ends) else 0


def masked_compress(values: Tensor, packed: Tensor) -> Tensor:
    """Launch :func:`taskloom.masked_compress`."""
    numel = values.numel()
    block = entries_per_program(numel)
    bits = flat(packed)
    places, total = _places(bits, numel, block)
    compressed = torch.empty(total, dtype=values.dtype, device=values.device)
    arguments = (_integers(values, "values").view(-1), bits, places, _integers(compressed, "values"), numel)
    launch(masked_compress_kernel, (len(places),), *arguments, BLOCK=block)
    return compressed


def masked_restore(compressed: Tensor, packed: Tensor, base: Tensor) -> Tensor:
    """Launch :func:`taskloom.masked_restore`."""
    if compressed.dtype != base.dtype:
        raise RuntimeError(f"compressed: expected {base.dtype} as base, got {compressed.dtype}")
    numel = base.numel()
    block = entries_per_program(numel)
    bits = flat(packed)
    places, total = _places(bits, numel, block)
    if compressed.numel() != total:
        raise RuntimeError(f"compressed: expected {total} elements, one for each set entry, got {compressed.numel()}")
    restored = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    arguments = (_integers(compressed, "compressed"), bits, places, _integers(base, "base"), _integers(restored, "base"), numel)
    launch(masked_restore_kernel, (len(places),), *arguments, BLOCK=block)
    return restored

"""mask_count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.triton_kernels.launch import entries_per_program, flat, launch, programs, table
from taskloom.triton_kernels.masked.entries import listed_pointer, load_bits, program_offsets, store_bits

# A program counts in shared memory up to this many bins, and in global memory above.
_MOST_BINS = 2048


@triton.jit
def mask_count_kernel(first, addresses, selected, histogram, numel, tasks, k, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """How many masks set each entry: at least k sets it in ``selected``; BINS = 0 adds every entry to the histogram by itself."""
    offsets = program_offsets(BLOCK)
    inside = offsets < numel
    counts = tl.zeros([BLOCK], tl.int32)
    task = 0
    while task < tasks:
        counts += load_bits(listed_pointer(addresses, task, first, False), offsets, inside).to(tl.int32)
        task += 1
    store_bits(selected, tl.program_id(0).to(tl.int64) * BLOCK, numel, inside & (counts >= k), BLOCK)
    if BINS == 0:
        tl.atomic_add(histogram + counts, tl.full([BLOCK], 1, tl.int64), mask=inside)
    else:
        bins = tl.arange(0, BINS)
        tl.atomic_add(histogram + bins, tl.histogram(counts, BINS, mask=inside).to(tl.int64), mask=bins <= tasks)


def mask_count(packed: Sequence[Tensor], numel: int, k: int) -> tuple[Tensor, Tensor]:
    """Launch :func:`taskloom.mask_count`."""
    device, tasks = packed[0].device, len(packed)
    selected = torch.empty((numel + 7) // 8, dtype=torch.uint8, device=device)
    histogram = torch.zeros(tasks + 1, dtype=torch.int64, device=device)
    masks = [flat(mask) for mask in packed]
    bins = triton.next_power_of_2(tasks + 1)
    block = entries_per_program(numel, 2048)
    constants = {"BINS": bins if bins <= _MOST_BINS else 0, "BLOCK": block}
    addresses = table([mask.data_ptr() for mask in masks], device)
    # More than every task is as much as one more, and fits 32 bits.
    arguments = (masks[0], addresses, selected, histogram, numel, tasks, min(k, tasks + 1))
    launch(mask_count_kernel, (programs(numel, block),), *arguments, **constants)
    return selected, histogram

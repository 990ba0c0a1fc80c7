"""expert_sort: counts of each tile's experts, their sums by torch, and places by rank within a tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.reference.gating.expert_sort import padded_size
from taskloom.triton_kernels.gating.indices import check_indices
from taskloom.triton_kernels.launch import INTERPRETED, launch


@triton.jit
def _matches(ids, entry, entries, expert):
    """Which of a tile's entries are of which of some experts."""
    chosen = tl.load(ids + entry, mask=entry < entries, other=-1)
    return chosen[:, None] == expert[None, :]


@triton.jit
def expert_count_kernel(ids, counts, entries, experts, TILE: tl.constexpr, EXPERTS: tl.constexpr):
    """How often each expert is in a tile."""
    tile = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    found = _matches(ids, tile * TILE + tl.arange(0, TILE), entries, expert)
    tl.store(counts + tile * experts + expert, tl.sum(found.to(tl.int32), axis=0), mask=expert < experts)


@triton.jit
def expert_place_kernel(ids, first, order, inverse, entries, experts, TILE: tl.constexpr, EXPERTS: tl.constexpr):
    """The places of a tile's entries: the first of their expert there, and one more for each that came before."""
    tile = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    entry = tile * TILE + tl.arange(0, TILE)
    found = _matches(ids, entry, entries, expert) & (expert < experts)[None, :]
    ones = found.to(tl.int32)
    begin = tl.load(first + tile * experts + expert, mask=expert < experts, other=0)
    place = tl.sum(tl.where(found, begin[None, :] + tl.cumsum(ones, axis=0) - 1, 0), axis=1)
    mine = tl.sum(ones, axis=1) > 0
    tl.store(order + place, entry.to(tl.int32), mask=mine)
    tl.store(inverse + entry, place, mask=mine)


@triton.jit
def expert_blocks_kernel(order, offsets, padded_offsets, block_expert, padded, size, block, nothing, BLOCK: tl.constexpr):
    """The order in whole blocks."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < size
    expert = tl.load(block_expert + place // block, mask=there, other=-1)
    owned = there & (expert >= 0)
    begin = tl.load(offsets + expert, mask=owned, other=0)
    end = tl.load(offsets + expert + 1, mask=owned, other=0)
    source = begin + place - tl.load(padded_offsets + expert, mask=owned, other=0)
    tl.store(padded + place, tl.load(order + source, mask=owned & (source < end), other=nothing), mask=there)


def expert_sort(ids: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch :func:`taskloom.expert_sort`; an id that is out of range is found before, and matches no expert."""
    check_indices("expert_sort", "ids", ids, 0, num_experts, "the number of an expert")
    flat, entries = ids.contiguous(), ids.numel()
    shapes = {"TILE": 1024 if INTERPRETED else 64, "EXPERTS": min(128 if INTERPRETED else 64, triton.next_power_of_2(num_experts))}
    tiles = triton.cdiv(entries, shapes["TILE"])
    grid = (tiles, triton.cdiv(num_experts, shapes["EXPERTS"]))
    counts, order, inverse, offsets = (
        torch.empty(shape, dtype=torch.int32, device=ids.device)
        for shape in ((tiles, num_experts), (entries,), ids.shape, (num_experts + 1,))
    )
    launch(expert_count_kernel, grid, flat, counts, entries, num_experts, **shapes)
    offsets[:1] = 0
    torch.cumsum(counts.sum(0, dtype=torch.int32), 0, dtype=torch.int32, out=offsets[1:])
    first = offsets[:-1] + counts.cumsum(0, dtype=torch.int32) - counts
    launch(expert_place_kernel, grid, flat, first, order, inverse, entries, num_experts, **shapes)
    if block == 0:
        none = order.new_empty(0), order.new_empty(0), order.new_empty(0)
        return order, inverse, offsets, *none
    return order, inverse, offsets, *_blocks(order, offsets, entries, num_experts, block)


def _blocks(order: Tensor, offsets: Tensor, entries: int, num_experts: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    padded_offsets = torch.empty_like(offsets)
    padded_offsets[:1] = 0
    runs = (offsets[1:] - offsets[:-1] + block - 1) // block * block
    torch.cumsum(runs, 0, dtype=torch.int32, out=padded_offsets[1:])
    size = padded_size(entries, num_experts, block)
    begin = torch.arange(0, size, block, dtype=torch.int32, device=order.device)
    owner = torch.searchsorted(padded_offsets[1:].contiguous(), begin, right=True, out_int32=True)
    block_expert = torch.where(begin < padded_offsets[-1], owner, -1)
    padded = torch.empty(size, dtype=torch.int32, device=order.device)
    tile = min(1 << 16, triton.next_power_of_2(max(size, 1))) if INTERPRETED else 1024
    given = (order, offsets, padded_offsets, block_expert, padded, size, block, entries)
    launch(expert_blocks_kernel, (triton.cdiv(size, tile),), *given, BLOCK=tile)
    return padded, padded_offsets, block_expert

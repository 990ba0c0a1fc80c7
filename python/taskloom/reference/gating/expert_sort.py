"""The order of a batch's choices by expert, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def padded_size(entries: int, num_experts: int, block: int) -> int:
    """The most entries that runs of experts can take when each is filled up to whole blocks: whatever the ids are."""
    fullest: int = torch.sym_min(entries, num_experts)
    return (entries + fullest * (block - 1)) // block * block


def expert_sort(ids: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The stable order by expert, its inverse and the experts' offsets; with a block above 0 the same in whole blocks, else empty."""
    flat = ids.reshape(-1)
    entries = flat.numel()
    sorted_ids, order = torch.sort(flat, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(entries, device=ids.device)
    # Neither bincount nor searchsorted has a rule for vmap.
    counts = torch.zeros(num_experts, dtype=torch.int64, device=ids.device).scatter_add(0, flat.long(), torch.ones_like(order))
    zero = counts.new_zeros(1)
    offsets = torch.cat([zero, counts.cumsum(0)])
    found = (order.int(), inverse.reshape(ids.shape).int(), offsets.int())
    if block == 0:
        return (*found, zero[:0].int(), zero[:0].int(), zero[:0].int())
    padded_offsets = torch.cat([zero, ((counts + block - 1) // block * block).cumsum(0)])
    size = padded_size(entries, num_experts, block)
    places = torch.arange(entries, device=ids.device) + (padded_offsets - offsets)[sorted_ids]
    padded_order = torch.full((size,), entries, device=ids.device).scatter(0, places, order)
    first = torch.arange(0, size, block, device=ids.device)
    ends = padded_offsets[1:] // block
    owner = torch.zeros(size // block + 1, dtype=torch.int64, device=ids.device).scatter_add(0, ends, torch.ones_like(ends)).cumsum(0)[:-1]
    block_expert = torch.where(first < padded_offsets[-1], owner, -1)
    return (*found, padded_order.int(), padded_offsets.int(), block_expert.int())

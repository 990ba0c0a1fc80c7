"""In how many masks each entry is set, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taskloom.reference.masked.packed_mask import pack_mask, unpack_mask


def mask_count(packed: Tensor | Sequence[Tensor], numel: int, k: int) -> tuple[Tensor, Tensor]:
    """The packed mask of entries set in at least k masks, and how many entries are set in 0 .. T masks."""
    masks = list(packed)
    counts = sum((unpack_mask(mask, (numel,)).long() for mask in masks), torch.zeros(numel, dtype=torch.int64, device=masks[0].device))
    levels = torch.arange(len(masks) + 1, device=counts.device)
    return pack_mask(counts >= k), (counts == levels[:, None]).sum(1)

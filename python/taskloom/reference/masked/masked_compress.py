"""The entries that a packed mask sets, next to each other, and back, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from taskloom.reference.masked.packed_mask import unpack_mask


def masked_compress(values: Tensor, packed: Tensor) -> Tensor:
    """The values at set entries, in order."""
    return values.reshape(-1)[unpack_mask(packed, (values.numel(),))]


def masked_restore(compressed: Tensor, packed: Tensor, base: Tensor) -> Tensor:
    """Base with its set entries replaced by ``compressed``, in order."""
    mask = unpack_mask(packed, (base.numel(),))
    # Entries before the first set one take the padding at place -1.
    spread = torch.cat([compressed, compressed.new_zeros(1)])[mask.cumsum(0) - 1]
    return torch.where(mask, spread, base.reshape(-1)).reshape(base.shape)

"""An update of the entries that a mask sets, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.reference.masked.packed_mask import unpack_mask


def masked_update(target: Tensor, mask: Tensor, delta: Tensor, scale: float = 1.0) -> Tensor:
    """Round target + scale * delta to target's dtype at set entries; target itself elsewhere."""
    chosen = mask if mask.dtype == torch.bool else unpack_mask(mask, target.shape)
    dtype = accumulation_dtype(target, delta)
    updated = (target.to(dtype) + scale * delta.to(dtype)).to(target.dtype)
    return torch.where(chosen, updated, target)


def masked_update_(target: Tensor, mask: Tensor, delta: Tensor, scale: float = 1.0) -> Tensor:
    """The same in place."""
    return target.copy_(masked_update(target, mask, delta, scale))

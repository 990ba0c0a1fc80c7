"""From one task's weights to another's, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.reference.masked.packed_mask import unpack_mask


def masked_switch_(target: Tensor, base: Tensor, delta: Tensor, old_packed: Tensor, new_packed: Tensor) -> Tensor:
    """Where the masks differ: base + delta if the new one sets the entry, else base; target is changed nowhere else."""
    dtype = accumulation_dtype(target, base, delta)
    wanted = unpack_mask(new_packed, target.shape)
    changed = unpack_mask(old_packed ^ new_packed, target.shape)
    moved = (base.to(dtype) + delta.to(dtype)).to(target.dtype)
    return target.copy_(torch.where(changed, torch.where(wanted, moved, base.to(target.dtype)), target))

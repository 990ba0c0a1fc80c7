"""Which entries of a parameter are active: the forms that users give, and the one that is stored."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from taskloom.ops import magnitude_mask, pack_mask, unpack_mask

Mask: TypeAlias = Tensor | float | None

# A bit for every entry takes as much as 32 bits for each active one at this density; below it indices are less, and faster.
_INDEX_DENSITY = 1 / 32


def stored_mask(where: str, mask: Mask, param: Tensor) -> Tensor | None:
    """A mask as the optimisers keep it: packed uint8, ascending int32 or int64 indices, or None (all entries are active).

    Parameters
    ----------
    where
        What an error calls the mask.
    mask
        bool of the parameter's shape; packed uint8 (:func:`taskloom.pack_mask`); ascending int32 or int64 flat indices; a density, for the
        entries of largest magnitude of ``param``; or None.
    param
        The parameter.

    Raises
    ------
    TypeError, ValueError
        If the mask is nothing of these or does not fit.
    """
    if mask is None:
        return None
    if isinstance(mask, (int, float)) and not isinstance(mask, bool):
        mask = magnitude_mask(param.detach(), density=float(mask))
    if not isinstance(mask, Tensor):
        raise TypeError(f"{where}: expected a tensor, a density or None, got {type(mask).__name__}")
    mask = mask.detach().to(param.device)
    numel = param.numel()
    if mask.dtype == torch.bool:
        if mask.shape != param.shape:
            raise ValueError(f"{where}: expected shape {tuple(param.shape)} as its parameter, got {tuple(mask.shape)}")
        if int(mask.count_nonzero()) < _INDEX_DENSITY * numel:
            return mask.reshape(-1).nonzero().squeeze(1).to(torch.int32 if numel < 1 << 31 else torch.int64)
        return pack_mask(mask)
    if mask.dtype == torch.uint8:
        if mask.shape != ((numel + 7) // 8,):
            raise ValueError(f"{where}: expected {(numel + 7) // 8} bytes for {numel} entries, got shape {tuple(mask.shape)}")
        return pack_mask(unpack_mask(mask, (numel,)))
    if mask.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{where}: expected bool, packed uint8, int32 or int64 indices, got {mask.dtype}")
    if mask.dim() != 1:
        raise ValueError(f"{where}: expected indices of one dimension, got shape {tuple(mask.shape)}")
    if mask.numel() and not bool((mask[1:] > mask[:-1]).all() & (mask[0] >= 0) & (mask[-1] < numel)):
        raise ValueError(f"{where}: expected ascending indices without repeats, from 0 to below {numel}")
    return mask.clone(memory_format=torch.contiguous_format)


def indices_of(active: Tensor | None, param: Tensor) -> Tensor:
    """The flat indices of a stored mask, int64."""
    if active is None:
        return torch.arange(param.numel(), device=param.device)
    if active.dtype == torch.uint8:
        return unpack_mask(active, (param.numel(),)).nonzero().squeeze(1)
    return active.long()


def count_of(active: Tensor | None, param: Tensor) -> int:
    """How many entries a stored mask sets."""
    if active is None:
        return param.numel()
    return int(unpack_mask(active, (param.numel(),)).count_nonzero()) if active.dtype == torch.uint8 else active.numel()


def bool_of(active: Tensor | None, param: Tensor) -> Tensor:
    """A stored mask as bools of the parameter's shape."""
    if active is None:
        return torch.ones(param.shape, dtype=torch.bool, device=param.device)
    if active.dtype == torch.uint8:
        return unpack_mask(active, param.shape)
    mask = torch.zeros(param.numel(), dtype=torch.bool, device=param.device)
    mask[active.long()] = True
    return mask.view(param.shape)


def carried(state: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """State of ``new`` indices: that of ``old`` where an index is in both, else zero."""
    moved = torch.zeros(new.numel(), dtype=state.dtype, device=state.device)
    if old.numel():
        place = torch.searchsorted(old, new).clamp_(max=old.numel() - 1)
        both = old[place] == new
        moved[both] = state[place[both]]
    return moved

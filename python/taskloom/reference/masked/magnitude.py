"""Deltas and the order of their magnitudes, for the references of the masked family."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype


def delta(tuned: Tensor, base: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``tuned - base`` in ``dtype``; the values of ``tuned`` where there is no base."""
    values = tuned.to(dtype)
    return values if base is None else values - base.to(dtype)


def magnitude_bits(values: Tensor) -> Tensor:
    """The bits of ``|values|`` as int64: ordered as the magnitudes are, with NaN above infinity."""
    integer, mask = (torch.int64, 2**63 - 1) if values.dtype == torch.float64 else (torch.int32, 2**31 - 1)
    return (values.contiguous().view(integer) & mask).long()


def values_of_bits(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The magnitudes of ``dtype`` (float32 or float64) that bits stand for."""
    return bits.to(torch.int64 if dtype == torch.float64 else torch.int32).view(dtype)


def as_rows(values: Tensor) -> Tensor:
    """A matrix whose rows are the slices of the last dimension."""
    shape = values.shape or (1,)
    return values.reshape(prod(shape[:-1]), shape[-1])


def descending_ranks(bits: Tensor) -> Tensor:
    """Rank of every entry in its row, 0 for the largest; of equal entries the lower index is the larger."""
    order = bits.sort(dim=-1, descending=True, stable=True).indices
    positions = torch.arange(bits.shape[-1], device=bits.device).expand_as(order)
    return torch.zeros_like(order).scatter(-1, order, positions)


def keep_ranks(bits: Tensor, begin: int, end: int, by_row: bool) -> Tensor:
    """Bool mask of the descending ranks ``begin <= rank < end`` of the whole tensor or of each row."""
    ranks = descending_ranks(as_rows(bits) if by_row else bits.reshape(1, -1))
    return ((ranks >= begin) & (ranks < end)).reshape(bits.shape)


def keep_above(bits: Tensor, threshold: Tensor, equal_kept: Tensor) -> Tensor:
    """Bool mask of the entries above a threshold (of bits), and of the first ``equal_kept`` that equal it."""
    equal = (bits == threshold).reshape(-1)
    return (bits > threshold) | (equal & (equal.cumsum(0) <= equal_kept)).reshape(bits.shape)


def keep_between(bits: Tensor, threshold: Tensor, equal_kept: Tensor, dtype: torch.dtype) -> Tensor:
    """Bool mask of a band given as the two thresholds, and counts of kept equal entries, of its first and its end rank."""
    cuts = magnitude_bits(threshold.to(dtype))
    return keep_above(bits, cuts[1], equal_kept[1]) & ~keep_above(bits, cuts[0], equal_kept[0])


def concatenated_bits(tuned: Sequence[Tensor], base: Sequence[Tensor]) -> tuple[Tensor, torch.dtype]:
    """Magnitude bits of several deltas as one vector, and the dtype that they were taken in."""
    dtype = accumulation_dtype(*tuned, *base)
    origins: list[Tensor | None] = [*base] or [None] * len(tuned)
    parts = [magnitude_bits(delta(task, origin, dtype)).reshape(-1) for task, origin in zip(tuned, origins, strict=True)]
    return torch.cat(parts), dtype

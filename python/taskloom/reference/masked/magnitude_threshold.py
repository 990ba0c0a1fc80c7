"""Thresholds, histograms and masks by magnitude in plain torch: a stable sort."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.reference.masked.magnitude import (
    as_rows,
    concatenated_bits,
    delta,
    keep_between,
    keep_ranks,
    magnitude_bits,
    values_of_bits,
)
from taskloom.reference.masked.packed_mask import pack_mask


def magnitude_threshold(tuned: Sequence[Tensor], base: Sequence[Tensor], rank: Sequence[int], by_row: bool) -> tuple[Tensor, Tensor]:
    """The rank-th largest magnitude of all tensors as one vector (or of each row), and how many that equal it are among the first rank."""
    bits, dtype = concatenated_bits(tuned, base)
    rows = as_rows(bits.reshape(tuned[0].shape)) if by_row else bits.unsqueeze(0)
    above_all = torch.full((len(rows), 1), 2**63 - 1 if dtype == torch.float64 else 2**31 - 1, device=bits.device)
    descending = torch.cat([above_all, rows.sort(dim=-1, descending=True).values], dim=-1)
    places = torch.tensor(rank, dtype=torch.int64, device=bits.device)
    found = descending[:, places]
    greater = (rows.unsqueeze(1) > found.unsqueeze(2)).sum(2)
    threshold, equal_kept = values_of_bits(found, dtype), places - greater
    return (threshold, equal_kept) if by_row else (threshold[0], equal_kept[0])


def magnitude_histogram(tuned: Tensor, base: Tensor | None, shift: int, prefix: int, wide: bool) -> Tensor:
    """Counts of the 16-bit digit at ``shift`` of the magnitudes' bits, over the entries whose higher digits are ``prefix``."""
    bits = magnitude_bits(delta(tuned, base, torch.float64 if wide else torch.float32)).reshape(-1)
    top = shift + 16 == (64 if wide else 32)
    counted = torch.ones_like(bits) if top else ((bits >> (shift + 16)) == prefix).long()
    return torch.zeros(1 << 16, dtype=torch.int64, device=bits.device).scatter_add(0, (bits >> shift) & 0xFFFF, counted)


def magnitude_mask(
    tuned: Tensor,
    base: Tensor | None,
    rank_begin: int,
    rank_end: int,
    by_row: bool,
    threshold: Tensor | None,
    equal_kept: Tensor | None,
    packed: bool,
) -> Tensor:
    """Bool (or packed) mask of a band of descending magnitude ranks, or of what lies between two given thresholds."""
    dtype = accumulation_dtype(tuned, base)
    bits = magnitude_bits(delta(tuned, base, dtype))
    if threshold is not None and equal_kept is not None:
        mask = keep_between(bits, threshold, equal_kept, dtype)
    else:
        mask = keep_ranks(bits, rank_begin, rank_end, by_row)
    return pack_mask(mask) if packed else mask

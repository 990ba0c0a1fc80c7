"""The selection stage of sparse_merge in plain torch: which entries of a task's delta survive."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taskloom.reference.masked.magnitude import as_rows, descending_ranks, keep_between, keep_ranks, magnitude_bits
from taskloom.reference.masked.packed_mask import unpack_mask
from taskloom.reference.masked.philox import philox_words

_TASK_KEY_STEP = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Selection:
    """What one task's selection needs; unused fields are None or zero. ``key`` is the tensor's, ``task`` the task's number.

    ``first`` is the index in its tensor of the first entry, where a tensor is taken in pieces.
    """

    select: str
    by_row: bool
    band: tuple[int, int]
    threshold: Tensor | None
    equal_kept: Tensor | None
    mask: Tensor | None
    density: float
    epsilon: float
    seed: int
    key: int
    task: int
    first: int = 0

    def words(self, numel: int, device: torch.device) -> Tensor:
        """The random words of this task's entries."""
        key = ((self.key & (2**64 - 1)) + self.task * _TASK_KEY_STEP) % 2**64
        return philox_words(self.seed & (2**64 - 1), key, numel, device, self.first)


def keep_limit(probability: Tensor) -> Tensor:
    """A 32-bit word below this keeps an entry of a probability."""
    return (probability.double() * 2.0**32).round().long()


def rank_probabilities(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """DELLA's keep probabilities in float32: linear in the ascending magnitude rank within the row (arXiv 2406.11617, section 3.1)."""
    rows = as_rows(delta)
    length = rows.shape[1]
    if length <= 1 or epsilon == 0:
        return torch.full_like(delta, density, dtype=torch.float32)
    ascending = length - 1 - descending_ranks(magnitude_bits(rows))
    share = ascending.float() / torch.tensor(length - 1, dtype=torch.float32, device=delta.device)
    raised = share * torch.tensor(2 * epsilon, dtype=torch.float32, device=delta.device)
    lowest = torch.tensor(density - epsilon, dtype=torch.float32, device=delta.device)
    return (lowest + raised).reshape(delta.shape)


def selected_entries(delta: Tensor, selection: Selection) -> Tensor:
    """Bool mask of the entries that survive."""
    words = selection.words(delta.numel(), delta.device).reshape(delta.shape) if selection.select.endswith("dropout") else None
    if selection.select == "magnitude":
        bits = magnitude_bits(delta)
        if selection.threshold is not None and selection.equal_kept is not None:
            return keep_between(bits, selection.threshold, selection.equal_kept, delta.dtype)
        return keep_ranks(bits, *selection.band, selection.by_row)
    if selection.select == "mask" and selection.mask is not None:
        return unpack_mask(selection.mask, delta.shape)
    if selection.select == "dropout" and words is not None:
        return words < keep_limit(torch.tensor(selection.density, dtype=torch.float64, device=delta.device))
    if selection.select == "rank_dropout" and words is not None:
        return words < keep_limit(rank_probabilities(delta, selection.density, selection.epsilon))
    return torch.ones_like(delta, dtype=torch.bool)

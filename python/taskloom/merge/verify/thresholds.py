"""Exact magnitude thresholds of tensors that are never held as a whole: radix selection over the bits, 16 at a time.

Written apart from the compiled selection, on the reference's own definition of a magnitude's bits, so that one can be checked by the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taskloom.reference.masked.magnitude import values_of_bits

_DIGIT = 16
_BINS = 1 << _DIGIT

Passes = Callable[[], Iterable[Sequence[Tensor]]]


@dataclass(frozen=True)
class RankCut:
    """Where a descending rank falls: the magnitude's bits, and how many entries that equal it rank before it."""

    bits: int
    equal_kept: int

    def value(self, dtype: torch.dtype) -> Tensor:
        """The magnitude as a number of ``dtype``."""
        return values_of_bits(torch.tensor(self.bits), dtype)


class _Search:
    """One rank of one task: the digits of its magnitude found so far, and the rank among the entries that have them."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.prefix = 0

    def narrow(self, counts: Tensor) -> None:
        """Take the next digit from the counts of each."""
        at_least = counts.flip(0).cumsum(0).flip(0)
        digit = int((at_least >= self.rank).nonzero()[-1])
        self.rank -= int(at_least[digit] - counts[digit])
        self.prefix = self.prefix << _DIGIT | digit


def rank_cuts(passes: Passes, ranks: Sequence[Sequence[int]], wide: bool) -> list[list[RankCut]]:
    """The cut of every rank of every task.

    Parameters
    ----------
    passes
        Called once per pass; gives the pieces of the segment, each as the tasks' magnitude bits (int64).
    ranks
        Per task, how many entries come before the cut: 0 is above every entry.
    wide
        Whether magnitudes are float64 (four passes instead of two).
    """
    bits = 64 if wide else 32
    above_all = 2 ** (bits - 1) - 1
    searches = [[_Search(rank) for rank in of_task] for of_task in ranks]
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        prefixes = [sorted({search.prefix for search in of_task if search.rank > 0}) for of_task in searches]
        counts = [{prefix: torch.zeros(_BINS, dtype=torch.int64) for prefix in of_task} for of_task in prefixes]
        for piece in passes():
            for magnitudes, of_task in zip(piece, counts, strict=True):
                for prefix, total in of_task.items():
                    counted = magnitudes if shift + _DIGIT == bits else magnitudes[magnitudes >> (shift + _DIGIT) == prefix]
                    total += torch.bincount(counted >> shift & (_BINS - 1), minlength=_BINS)
        for searching, of_task in zip(searches, counts, strict=True):
            for search in searching:
                if search.rank > 0:
                    search.narrow(of_task[search.prefix])
    above = RankCut(above_all, 0)
    return [[RankCut(search.prefix, search.rank) if search.rank > 0 else above for search in of_task] for of_task in searches]

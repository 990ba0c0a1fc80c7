"""The tasks' shared vector, piece by piece: the plain sum of their deltas, or TIES over the whole model in exact streaming passes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import taskloom
from taskloom._selection import band_ranks
from taskloom.archive.pieces import Buffers, Piece, Progress, Reader, count_pieces, cut_pieces, run_pieces
from taskloom.archive.planned import PlannedArchive, SharedTensor
from taskloom.merge.errors import CheckpointError
from taskloom.ops import MagnitudeThreshold

# A histogram has 65,536 bins, so it is counted over longer pieces than the rest.
_HISTOGRAM_PIECE = 1 << 21
_DIGITS = 1 << 16

# numpy's, because torch would share the little work on a histogram out among threads.
Counts = np.ndarray[Any, np.dtype[np.int64]]


def accumulated(values: Tensor, wide: bool) -> Tensor:
    """Values in the dtype that they are computed in."""
    return values.to(torch.float64 if wide else torch.float32)


def read_piece(reader: Reader, tensor: SharedTensor, piece: Piece) -> tuple[Tensor, list[Tensor]]:
    """The base's and every task's values of a piece."""
    base = reader.read(tensor.base, piece)
    return base, [reader.read(entry, piece, slot) for slot, entry in enumerate(tensor.tuned, start=1)]


def check_finite(planned: PlannedArchive, piece: Piece, base: Tensor, tuned: Sequence[Tensor]) -> None:
    """Refuse a piece with NaN or infinity in it.

    Raises
    ------
    CheckpointError
        Names model, tensor and entry.
    """
    labels = (planned.cast.reference.label, *(task.label for task in planned.cast.tasks))
    for label, values in zip(labels, (base, *tuned), strict=True):
        bad = torch.isfinite(values).logical_not_()
        if bad.any():
            entry = int(bad.nonzero()[0])
            raise CheckpointError(
                f"model {label!r}: tensor {planned.shared[piece.tensor].name!r} holds {float(values[entry])} at entry "
                f"{piece.begin + entry}; only finite weights can be compressed"
            )


class SumVector:
    """``sum_t (tuned_t - base)``."""

    def piece(self, piece: Piece, base: Tensor, tuned: list[Tensor]) -> Tensor:
        """The vector's values of one piece, float32 or float64."""
        return taskloom.multi_task_vector(base, tuned)


class _RadixSearch:
    """Finds the magnitude of a descending rank >= 1 from histograms of its bits, 16 at a time and the highest first."""

    def __init__(self, rank: int) -> None:
        self.prefix = 0
        self.equal = 0
        self._left = rank

    def narrow(self, counts: Counts) -> None:
        """Take the next digit from the histogram of the entries that have the prefix."""
        from_top = counts[::-1].cumsum()
        place = int((from_top < self._left).sum())
        self.equal = int(counts[_DIGITS - 1 - place])
        self._left -= int(from_top[place]) - self.equal
        self.prefix = (self.prefix << 16) | (_DIGITS - 1 - place)

    def threshold(self, wide: bool) -> MagnitudeThreshold:
        """The magnitude, and how many of the ``equal`` entries that have it are within the rank."""
        integer, floating = (torch.int64, torch.float64) if wide else (torch.int32, torch.float32)
        return MagnitudeThreshold(torch.tensor(self.prefix, dtype=integer).view(floating), torch.tensor(self._left))


class TiesVector:
    """TIES without its mean: trim over the whole model, elect each entry's sign, sum what agrees.

    A vote of exactly zero takes the majority sign of the whole model. Of equal magnitudes those of the lower index in the model, its
    tensors sorted by name, are kept. Selection, election and sum are those of ``merge_method: consensus_ties``.

    Parameters
    ----------
    planned, reader, threads, progress
        What to read, and how. Making the vector's thresholds reads all models up to four times.

    Raises
    ------
    CheckpointError
        If a weight is not finite.
    """

    def __init__(self, planned: PlannedArchive, reader: Reader, threads: int, progress: Progress) -> None:
        self._planned = planned
        self._reader = reader
        self._threads = threads
        self._progress = progress
        self._sizes = [tensor.base.numel for tensor in planned.shared]
        self._wide = planned.shared[0].wide
        self._thresholds: list[MagnitudeThreshold] = []
        # Per task, how many entries equal to the threshold each piece keeps.
        self._quotas: list[list[int]] = []
        self._sign = 1
        self._buffers = Buffers()
        if sum(self._sizes):
            self._find_thresholds()
            self._share_ties()
            self._find_majority()

    def _each(self, work: Callable[[Piece, Tensor, list[Tensor]], None], length: int | None = None) -> None:
        def read_and_work(piece: Piece) -> None:
            tensor = self._planned.shared[piece.tensor]
            base, tuned = read_piece(self._reader, tensor, piece)
            work(piece, base, tuned)
            self._progress.add(sum(values.numel() * values.element_size() for values in (base, *tuned)))

        pieces = cut_pieces(self._sizes) if length is None else cut_pieces(self._sizes, length)
        run_pieces(pieces, read_and_work, self._threads, self._progress.tell)

    def _histograms(self, shift: int, prefixes: Sequence[int]) -> list[Counts]:
        totals = [np.zeros(_DIGITS, dtype=np.int64) for _ in prefixes]
        lock = threading.Lock()

        def count(piece: Piece, base: Tensor, tuned: list[Tensor]) -> None:
            for total, values, prefix in zip(totals, tuned, prefixes, strict=True):
                counts = taskloom.magnitude_histogram(values, base, shift=shift, prefix=prefix, wide=self._wide)
                with lock:
                    total += counts.numpy()

        self._each(count, _HISTOGRAM_PIECE)
        return totals

    def _check_all_finite(self, totals: Sequence[Counts]) -> None:
        first_nonfinite = 0x7FF0 if self._wide else 0x7F80
        if any(int(total[first_nonfinite:].sum()) for total in totals):
            self._each(lambda piece, base, tuned: check_finite(self._planned, piece, base, tuned))
            raise CheckpointError("differences from the base overflow; such models cannot be compressed")

    def _find_thresholds(self) -> None:
        """Radix search over the bits of the magnitudes, all tasks in one pass per digit."""
        shifts = (48, 32, 16, 0) if self._wide else (16, 0)
        parameters = sum(self._sizes)
        searches = [_RadixSearch(band_ranks(parameters, share, at_least_one=True)[1]) for share in self._planned.compression.density]
        for shift in shifts:
            totals = self._histograms(shift, [search.prefix for search in searches])
            if shift == shifts[0]:
                self._check_all_finite(totals)
            for search, total in zip(searches, totals, strict=True):
                search.narrow(total)
        self._thresholds = [search.threshold(self._wide) for search in searches]
        self._equal = [search.equal for search in searches]

    def _share_ties(self) -> None:
        pieces = count_pieces(self._sizes)
        cut = [int(threshold.equal_kept) < equal for threshold, equal in zip(self._thresholds, self._equal, strict=True)]
        equals = [[0] * pieces if is_cut else [] for is_cut in cut]

        def count(piece: Piece, base: Tensor, tuned: list[Tensor]) -> None:
            origin = accumulated(base, self._wide)
            for task, values in enumerate(tuned):
                if cut[task]:
                    magnitudes = (accumulated(values, self._wide) - origin).abs_()
                    equals[task][piece.index] = int((magnitudes == self._thresholds[task].threshold).sum())

        if any(cut):
            self._each(count)
        else:
            self._progress.add(sum(tensor.bytes_in for tensor in self._planned.shared))
        for task, threshold in enumerate(self._thresholds):
            left = int(threshold.equal_kept)
            quotas = []
            for equal in equals[task]:
                quotas.append(min(equal, left))
                left -= quotas[-1]
            self._quotas.append(quotas)

    def _masks(self, piece: Piece, deltas: Sequence[Tensor]) -> list[Tensor]:
        masks = []
        for task, delta in enumerate(deltas):
            threshold, equal_kept = self._thresholds[task]
            if self._quotas[task]:
                equal_kept = torch.tensor(self._quotas[task][piece.index])
            masks.append(taskloom.magnitude_mask(delta, threshold=MagnitudeThreshold(threshold, equal_kept), packed=True))
        return masks

    def _deltas(self, base: Tensor, tuned: Sequence[Tensor]) -> list[Tensor]:
        origin = self._take(base, 1).copy_(base)
        return [self._take(values, slot).copy_(values).sub_(origin) for slot, values in enumerate(tuned, start=2)]

    def _take(self, like: Tensor, slot: int) -> Tensor:
        return self._buffers.take(like.numel(), torch.float64 if self._wide else torch.float32, slot)

    def _find_majority(self) -> None:
        lock = threading.Lock()
        total = 0

        def count(piece: Piece, base: Tensor, tuned: list[Tensor]) -> None:
            nonlocal total
            votes = self._take(base, 0)
            deltas = self._deltas(base, tuned)
            taskloom.sparse_merge(None, deltas, select="mask", masks=self._masks(piece, deltas), out=votes)
            here = int(torch.count_nonzero(votes > 0)) - int(torch.count_nonzero(votes < 0))
            with lock:
                total += here

        self._each(count)
        self._sign = -1 if total < 0 else 1

    def piece(self, piece: Piece, base: Tensor, tuned: list[Tensor]) -> Tensor:
        """The vector's values of one piece, float32 or float64; this thread's until the next call."""
        deltas = self._deltas(base, tuned)
        masks = self._masks(piece, deltas)
        if self._sign < 0:
            # The election gives a zero vote to the positive entries; turned around, to the negative ones.
            deltas = [delta.neg_() for delta in deltas]
        summed = self._take(base, 0)
        taskloom.sparse_merge(None, deltas, select="mask", masks=masks, elect="sign_sum", zero_sign="positive", out=summed)
        # Adding zero turns a negative zero into a positive one.
        return summed if self._sign > 0 else summed.neg_().add_(0.0)

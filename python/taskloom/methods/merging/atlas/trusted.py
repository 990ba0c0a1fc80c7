"""Test-time adaptation without labels: the predictions that are trusted, and batches of them and of the others."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler


class TrustedSamples(NamedTuple):
    """``pseudo`` [N] int64, the class predicted for each sample, and ``trusted`` [N] bool, whether it is taken for the truth."""

    pseudo: Tensor
    trusted: Tensor


def select_trusted(probs: Tensor, max_per_class: int = 100) -> TrustedSamples:
    """Trust the most confident predictions of each class: ``min(N / classes / 10, max_per_class)`` of those that predict it.

    Parameters
    ----------
    probs
        The base model's probabilities [N, classes], floating point.
    max_per_class
        Default 100.

    Returns
    -------
    TrustedSamples
        A class that fewer samples are predicted to be has fewer trusted ones. Of equally confident samples the first are taken.

    Raises
    ------
    TypeError
        If ``probs`` is not floating point.
    ValueError
        If it has another shape, holds what is no probability, or its rows do not sum to 1; if ``max_per_class`` is below 1.

    Warns
    -----
    UserWarning
        If there are fewer than 10 samples per class, of which none is trusted.

    Notes
    -----
    Source: Zhang et al. 2024, arXiv 2407.02880, test-time adaptation, as it is meant. The authors' code ranks all samples by the
    probability of a class, also those predicted to be another, and then marks every sample as trusted.
    """
    if not probs.is_floating_point():
        raise TypeError(f"select_trusted: probs: expected floating-point probabilities, got {probs.dtype}")
    if probs.dim() != 2 or 0 in probs.shape:
        raise ValueError(f"select_trusted: probs: expected shape [N, classes] with N and classes >= 1, got {list(probs.shape)}")
    # Written so that NaN fails; the sum's bound leaves room for half precision.
    valid = (probs >= 0).all() & ((probs.float().sum(1) - 1).abs() <= 1e-2).all()
    if not bool(valid):
        raise ValueError("select_trusted: probs: expected rows of probabilities that sum to 1, got others (logits need a softmax)")
    if max_per_class < 1:
        raise ValueError(f"select_trusted: max_per_class: expected 1 or more, got {max_per_class}")
    count = min(len(probs) // (10 * probs.shape[1]), max_per_class)
    if count == 0:
        warnings.warn(
            f"select_trusted: {len(probs)} samples for {probs.shape[1]} classes: fewer than 10 a class, so none is trusted", stacklevel=2
        )
    confidence, pseudo = probs.max(1)
    order = confidence.argsort(descending=True, stable=True)
    # The same order, class by class.
    order = order[pseudo[order].argsort(stable=True)]
    sizes = pseudo.bincount(minlength=probs.shape[1])
    place = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[pseudo[order]]
    trusted = torch.zeros_like(pseudo, dtype=torch.bool)
    trusted[order[place < count]] = True
    return TrustedSamples(pseudo, trusted)


class TrustedBatches(Sampler[list[int]]):
    """Batches of samples for a ``DataLoader(batch_sampler=...)``: three quarters are others, a quarter is trusted.

    An epoch goes once through the others in a new order; those that do not fill a batch wait for another epoch. The trusted ones go round
    as often as needed, in a new order each round, and come last in a batch.

    Parameters
    ----------
    trusted
        Bool [N], as :func:`select_trusted` gives it.
    batch_size
        At least 2.
    trusted_share
        Share of a batch, in (0, 1); rounded down, but at least one sample. Default a quarter.
    seed
        Of the orders. The n-th epoch's batches follow from it and n alone.

    Raises
    ------
    TypeError
        If ``trusted`` is not bool.
    ValueError
        If it has another shape, no sample is trusted, the others do not fill a batch, or a number is out of range.

    Notes
    -----
    Source: Zhang et al. 2024, arXiv 2407.02880, and its code.
    """

    def __init__(self, trusted: Tensor, batch_size: int, *, trusted_share: float = 0.25, seed: int = 0) -> None:
        if trusted.dtype != torch.bool:
            raise TypeError(f"TrustedBatches: trusted: expected torch.bool, got {trusted.dtype}")
        if trusted.dim() != 1:
            raise ValueError(f"TrustedBatches: trusted: expected shape [N], got {list(trusted.shape)}")
        if batch_size < 2:
            raise ValueError(f"TrustedBatches: batch_size: expected at least 2, got {batch_size}")
        if not 0 < trusted_share < 1:
            raise ValueError(f"TrustedBatches: trusted_share: expected a number between 0 and 1, got {trusted_share}")
        self._trusted, self._others = (mask.nonzero()[:, 0].cpu() for mask in (trusted, ~trusted))
        self._from_trusted = max(1, int(batch_size * trusted_share))
        self._from_others = batch_size - self._from_trusted
        self._seed = seed
        self._epoch = 0
        if len(self._trusted) == 0:
            raise ValueError("TrustedBatches: trusted: expected at least one trusted sample, got none")
        if len(self._others) < self._from_others:
            expected = f"expected at least {self._from_others} samples that are not trusted, enough for a batch of {batch_size}"
            raise ValueError(f"TrustedBatches: trusted: {expected}, got {len(self._others)}")

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._others) // self._from_others

    def __iter__(self) -> Iterator[list[int]]:
        """The next epoch's batches, as lists of indices."""
        generator = torch.Generator().manual_seed(1_000_003 * self._seed + self._epoch)
        self._epoch += 1
        rounds = self._rounds(generator)
        others = self._others[torch.randperm(len(self._others), generator=generator)].tolist()
        for place in range(len(self)):
            begin = place * self._from_others
            yield others[begin : begin + self._from_others] + [next(rounds) for _ in range(self._from_trusted)]

    def _rounds(self, generator: torch.Generator) -> Iterator[int]:
        while True:
            yield from self._trusted[torch.randperm(len(self._trusted), generator=generator)].tolist()

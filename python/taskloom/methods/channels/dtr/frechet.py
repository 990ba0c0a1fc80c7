"""The Frechet distance between two samples, as in FID, on raw features."""

from __future__ import annotations

import torch
from torch import Tensor


def _moments(samples: Tensor) -> tuple[Tensor, Tensor]:
    samples = samples.double().flatten(1)
    return samples.mean(0), samples.mT.cov()


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` of the means and covariances of two samples.

    Parameters
    ----------
    one, other
        [N, ...] and [M, ...], of the same features; at least two of each. Computed in float64.

    Returns
    -------
    float
        0 for equal moments.

    Raises
    ------
    ValueError
        If the features differ in number, or a sample has fewer than two members.
    """
    for name, samples in (("one", one), ("other", other)):
        if len(samples) < 2 or samples[0].numel() != one[0].numel():
            raise ValueError(f"{name}: expected at least two samples of {one[0].numel()} features, got shape {tuple(samples.shape)}")
    (mean, cov), (other_mean, other_cov) = _moments(one), _moments(other)
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.mT
    # The eigenvalues of S1 S2 are those of the symmetric S1^(1/2) S2 S1^(1/2).
    shared = torch.linalg.eigvalsh(root @ other_cov @ root).clamp(min=0).sqrt().sum()
    return float((mean - other_mean).square().sum() + cov.trace() + other_cov.trace() - 2 * shared)

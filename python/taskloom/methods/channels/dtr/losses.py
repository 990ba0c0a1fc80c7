"""Weights of the diffusion loss that the paper combines DTR with: Min-SNR, P2, and the uncertainty weighting of ANT."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

CLUSTERS = 8


def min_snr_weight(snr: Tensor, gamma: float = 5.0) -> Tensor:
    """Min-SNR: ``min(snr, gamma) / snr``, for a model that predicts the noise.

    Parameters
    ----------
    snr
        Signal-to-noise ratios of the samples' timesteps, any shape; :meth:`Diffusion.snr` gives them.
    gamma
        Above 0. Default 5.

    Notes
    -----
    Source: Efficient Diffusion Training via Min-SNR Weighting Strategy, 2023, arXiv 2303.09556.
    """
    if not gamma > 0:
        raise ValueError(f"gamma: expected a number above 0, got {gamma}")
    # Not snr.clamp(max=gamma) / snr, which is 0 / 0 where a schedule ends in pure noise.
    return (gamma / snr).clamp(max=1)


def p2_weight(snr: Tensor, gamma: float = 1.0, k: float = 1.0) -> Tensor:
    """P2: ``1 / (k + snr) ** gamma``.

    Notes
    -----
    Source: Perception Prioritized Training of Diffusion Models, 2022, arXiv 2204.00227.
    """
    if not k > 0:
        raise ValueError(f"k: expected a number above 0, got {k}")
    return (k + snr) ** -gamma


def _check_split(batch: int, clusters: int) -> None:
    if clusters < 1:
        raise ValueError(f"clusters: expected at least 1, got {clusters}")
    if batch < 1 or batch % clusters:
        raise ValueError(f"batch: expected a multiple of the {clusters} clusters of timesteps, got {batch}")


def cluster_timesteps(
    batch: int,
    num_timesteps: int,
    clusters: int = CLUSTERS,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Timesteps for :class:`UncertaintyWeighting`: an equal part of the batch in each of so many equal intervals, in their order.

    Parameters
    ----------
    batch
        A multiple of ``clusters``.
    num_timesteps, clusters
        Cluster i holds the timesteps from ``i T / clusters`` to ``(i + 1) T / clusters``, both rounded down, without the last.
    generator
        Default: torch's own.
    device
        Where the result goes. Default: the CPU, where it is drawn.

    Returns
    -------
    int64 [batch]

    Raises
    ------
    ValueError
        If the batch cannot be split, or there are fewer timesteps than clusters.
    """
    _check_split(batch, clusters)
    if num_timesteps < clusters:
        raise ValueError(f"num_timesteps: expected at least the {clusters} clusters, got {num_timesteps}")
    edges = [num_timesteps * place // clusters for place in range(clusters + 1)]
    drawn = [torch.randint(low, high, (batch // clusters,), generator=generator) for low, high in pairwise(edges)]
    return torch.cat(drawn).to(device)


class UncertaintyWeighting(nn.Module):
    """ANT-UW: each cluster of timesteps is a task, weighted by its learned uncertainty.

    Its parameter ``log_variance`` [clusters] starts at 0; the paper trains it with a learning rate of 0.025 and no weight decay.

    Parameters
    ----------
    clusters
        Default 8.

    Notes
    -----
    Source: Addressing Negative Transfer in Diffusion Models, 2023, arXiv 2306.00354, as in DTR's official code.
    """

    def __init__(self, clusters: int = CLUSTERS) -> None:
        super().__init__()
        _check_split(clusters, clusters)
        self.log_variance = nn.Parameter(torch.zeros(clusters))

    def forward(self, losses: Tensor) -> Tensor:
        """``sum_i 0.5 * (exp(-s_i) * l_i / clusters + s_i)``, l_i the mean loss of cluster i.

        Parameters
        ----------
        losses
            [N], of a batch with the timesteps of :func:`cluster_timesteps`, in its order.

        Returns
        -------
        Tensor
            A scalar to be minimised.

        Raises
        ------
        ValueError
            If ``losses`` has another number of axes, or cannot be split into equal parts.
        """
        clusters = len(self.log_variance)
        if losses.ndim != 1:
            raise ValueError(f"losses: expected one per sample, [N], got shape {tuple(losses.shape)}")
        _check_split(len(losses), clusters)
        means = losses.view(clusters, -1).mean(1) / clusters
        return 0.5 * (torch.exp(-self.log_variance) * means + self.log_variance).sum()

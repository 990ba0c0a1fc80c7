"""The neighbours of samples among those that the model answers correctly, in the space of a text encoder."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from taskloom.methods.routing.roma.config import RoMAConfig
from taskloom.methods.routing.roma.reference import ReferenceSet

# Bytes that the distances of one part of the queries may take, and the numbers they are sorted by.
_PART = 64 << 20


class Neighbors(NamedTuple):
    """Neighbours of n samples.

    Attributes
    ----------
    ids
        int64 ``[n, k]``: rows of the reference set, nearest first.
    weight
        float32 ``[n, k]``: their shares, which add up to 1; places without a neighbour have 0 (and row 0 of the reference set). A sample
        without neighbours has nothing but zeros.
    """

    ids: Tensor
    weight: Tensor


def _check(op: str, emb: Tensor, ref: ReferenceSet, config: RoMAConfig, keys: Tensor | None) -> Tensor | None:
    if emb.dim() != 2 or emb.shape[1] != ref.emb.shape[1] or not emb.is_floating_point():
        raise ValueError(
            f"{op}: emb: expected floating numbers of shape (n, {ref.emb.shape[1]}) as the reference's, got {emb.dtype} {tuple(emb.shape)}"
        )
    if not bool(emb.isfinite().all()):
        raise ValueError(f"{op}: emb: expected finite numbers")
    if not config.exclude_self:
        return None
    if keys is None:
        raise ValueError(
            f"{op}: keys: expected which samples these are, int64 of shape ({len(emb)},), since exclude_self is set; for samples that the "
            "reference set cannot hold, set exclude_self=False"
        )
    if keys.shape != (len(emb),) or keys.dtype != torch.int64:
        raise ValueError(f"{op}: keys: expected int64 of shape ({len(emb)},), got {keys.dtype} {tuple(keys.shape)}")
    return keys.to(ref.keys.device)


def _squared_distances(emb: Tensor, reference: Tensor) -> Tensor:
    """float64 ``[n, S]``; products in float64, so that what cancels leaves enough."""
    a, b = emb.double(), reference.double()
    return (a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * (a @ b.T)).clamp_(min=0)


def _rounding(emb: Tensor, reference: Tensor) -> Tensor:
    """What rounding may add to each of these distances at most, ``[n, S]``: that of a sample to its own copy need not be 0."""
    norms = emb.double().square().sum(1, keepdim=True) + reference.double().square().sum(1)
    return norms * (emb.shape[1] * torch.finfo(torch.float64).eps)


def _nearest(squared: Tensor, k: int) -> Tensor:
    """The k nearest of each row ``[n, S]``, nearest first, equal ones (as float32) by their number."""
    # Floats that are not negative are in the order of their bits, so one integer holds distance and number.
    order = squared.float().view(torch.int32).long() << 32 | torch.arange(squared.shape[1], device=squared.device)
    return order.topk(k, dim=1, largest=False).indices


def _shares(squared: Tensor, usable: Tensor, sigma: float) -> Tensor:
    """The similarities of the usable ones, divided by their sum."""
    logits = torch.where(usable, -squared / (2 * sigma**2), -math.inf)
    return torch.where(usable, logits.softmax(1), 0.0).float()


def neighbor_weights(emb: Tensor, ref: ReferenceSet, config: RoMAConfig | None = None, keys: Tensor | None = None) -> Neighbors:
    """Find each sample's neighbours and their shares.

    Similarity is ``exp(-||a - b||^2 / (2 sigma^2))``. Neighbours are the ``config.k`` most similar of the reference set, or with
    ``config.eps`` all whose similarity is at least that. Distances are computed in float64 from the given dtype; samples at the same
    distance (as float32) are taken by their number.

    Parameters
    ----------
    emb
        Floating ``[n, F]``, on the device of ``ref.emb``.
    ref
        The reference set.
    config
        Default ``RoMAConfig()``.
    keys
        int64 ``[n]``: which samples these are, as ``ref.keys`` counts them; a sample is no neighbour of itself. Needed with
        ``config.exclude_self``, and not read without.

    Returns
    -------
    Neighbors
        ids and weight; k is the largest number of neighbours that a sample has.

    Raises
    ------
    ValueError
        If shapes or dtypes do not fit, or ``keys`` is missing.

    Notes
    -----
    Source: the RoMA paper, section 3, equations 6 and 7; that a sample is left out of its own neighbours is inferred.
    """
    config = config or RoMAConfig()
    keys = _check("neighbor_weights", emb, ref, config, keys)
    part = max(1, _PART // (8 * len(ref.keys)))
    # An infinite distance is that of a sample to itself, where it is left out.
    farthest = torch.finfo(torch.float64).max if not config.eps else -2 * config.sigma**2 * math.log(config.eps)
    ids, weights = [], []
    for begin in range(0, max(1, len(emb)), part):
        squared = _squared_distances(emb[begin : begin + part], ref.emb)
        if keys is not None:
            squared = torch.where(keys[begin : begin + part, None] == ref.keys, math.inf, squared)
        reach = farthest if config.eps is None else farthest + _rounding(emb[begin : begin + part], ref.emb)
        usable = squared <= reach
        most = int(usable.sum(1).max()) if len(usable) else 0
        k = most if config.eps is not None else min(config.k, most)
        chosen = _nearest(torch.where(usable, squared, math.inf), k)
        ids.append(chosen)
        weights.append(_shares(squared.gather(1, chosen), usable.gather(1, chosen), config.sigma))
    widest = max(one.shape[1] for one in ids)
    padded = [torch.nn.functional.pad(one, (0, widest - one.shape[1])) for one in (*ids, *weights)]
    found, shares = torch.cat(padded[: len(ids)]), torch.cat(padded[len(ids) :])
    return Neighbors(torch.where(shares > 0, found, 0), shares)


def random_neighbors(
    n: int, ref: ReferenceSet, config: RoMAConfig | None = None, keys: Tensor | None = None, generator: torch.Generator | None = None
) -> Neighbors:
    """Neighbours at random with equal shares: the paper's ablation.

    Parameters
    ----------
    n
        Samples.
    ref, config, keys
        As in :func:`neighbor_weights`; of the configuration ``k`` and ``exclude_self`` count.
    generator
        On the CPU. Default None: torch's own.

    Raises
    ------
    ValueError
        If the reference set has fewer than k others for each sample, or ``keys`` does not fit.
    """
    config = config or RoMAConfig()
    device = ref.emb.device
    keys = _check("random_neighbors", ref.emb.new_zeros(n, ref.emb.shape[1]), ref, config, keys)
    if len(ref.keys) - int(keys is not None) < config.k:
        raise ValueError(f"random_neighbors: k: expected at most {len(ref.keys) - int(keys is not None)}, got {config.k}")
    drawn = torch.rand(n, len(ref.keys), generator=generator).to(device)
    if keys is not None:
        drawn = drawn.masked_fill(keys[:, None] == ref.keys, -1.0)
    return Neighbors(drawn.topk(config.k, dim=1).indices, torch.full((n, config.k), 1 / config.k, device=device))

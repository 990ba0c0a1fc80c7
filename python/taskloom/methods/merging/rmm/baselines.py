"""What reversible merging is compared with: the factors merged among themselves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

import taskloom
from taskloom.methods.merging.rmm.space import Adapter, Factors

Separate = Literal["sum", "ties", "dare"]


def _merge(factors: list[Tensor], method: Separate, weight: float, density: float, seed: int, key: str) -> Tensor:
    weights = [weight] * len(factors)
    if method == "sum":
        return taskloom.sparse_merge(None, factors, weights)
    if method == "ties":
        trimmed = taskloom.sparse_merge(None, factors, select="magnitude", density=density, elect="sign_sum", combine="disjoint_mean")
        return weight * trimmed
    return taskloom.sparse_merge(None, factors, weights, select="dropout", density=density, rescale="density", seed=seed, key=key)


def _by_layer(adapters: Mapping[str, Adapter]) -> dict[str, list[Factors]]:
    """All tasks' factors of each layer."""
    if not adapters:
        raise ValueError("adapters: expected at least one task, got none")
    names = list(next(iter(adapters.values())))
    for task, adapter in adapters.items():
        if set(adapter) != set(names):
            raise ValueError(f"adapters: task {task!r}: expected the layers {', '.join(names)}, got {', '.join(adapter)}")
    return {layer: [adapter[layer] for adapter in adapters.values()] for layer in names}


def merge_separate(
    adapters: Mapping[str, Adapter], method: Separate = "sum", weight: float = 1.0, *, density: float = 0.2, seed: int = 0
) -> dict[str, Factors]:
    """One adapter for all tasks: the A's merged among themselves, and the B's among themselves.

    Parameters
    ----------
    adapters
        As :func:`fit_rmm` takes them.
    method
        ``"sum"``: task arithmetic, ``A = weight * sum_i A_i``; ``"ties"``: trim to ``density``, elect a sign, ``weight`` times the
        disjoint mean; ``"dare"``: drop at random, rescale, and sum.
    weight
        Factor of either factor. Default 1.0.
    density, seed
        Kept share of ``"ties"`` and ``"dare"``, default 0.2, and the seed of the latter.

    Notes
    -----
    PEFT's ``add_weighted_adapter`` merges factors separately too (its "linear" with the roots of the weights); its "cat" and "svd" merge
    the products.
    """
    if method not in ("sum", "ties", "dare"):
        raise ValueError(f"method: expected 'sum', 'ties' or 'dare', got {method!r}")
    merged = {}
    for layer, found in _by_layer(adapters).items():
        a = _merge([factor.contiguous() for factor, _ in found], method, weight, density, seed, f"{layer}.A")
        b = _merge([factor.contiguous() for _, factor in found], method, weight, density, seed, f"{layer}.B")
        merged[layer] = (a, b)
    return merged


def merge_products(adapters: Mapping[str, Adapter], weight: float = 1.0) -> dict[str, Tensor]:
    """Combined merging: ``weight * sum_i A_i B_i`` of each layer, a full-rank change that has to be stored whole."""
    merged = {}
    for layer, found in _by_layer(adapters).items():
        stacked = torch.cat([a for a, _ in found], 1), torch.cat([b for _, b in found], 0)
        merged[layer] = weight * (stacked[0] @ stacked[1])
    return merged

"""The arithmetic of restoring: ``base + mask * vector``, and how far it is from the task's own weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import taskloom

# Below this a float32 sum of squares has lost digits to underflow.
_TINY = 1e-30


def restore_values(base: Tensor, packed: Tensor, vector: Tensor, dtype: torch.dtype) -> Tensor:
    """Restore a task's values.

    Parameters
    ----------
    base
        Floating point, one-dimensional.
    packed
        The task's mask, uint8 [ceil(n / 8)].
    vector
        float32 or float64, as long as the base.
    dtype
        Of the result.

    Returns
    -------
    Tensor
        ``base + vector`` where the mask is set, else ``base``: computed in the vector's dtype and rounded once to ``dtype``.
    """
    if base.dtype == dtype:
        return taskloom.masked_update(base, packed, vector)
    return taskloom.masked_update(base.to(vector.dtype), packed, vector).to(dtype)


def square_sum(values: Tensor) -> float:
    """Sum of squares; in float64 where float32 would lose it to underflow or overflow."""
    total = float(torch.dot(values, values))
    if _TINY < total < math.inf:
        return total
    wide = values.double()
    return float(torch.dot(wide, wide))

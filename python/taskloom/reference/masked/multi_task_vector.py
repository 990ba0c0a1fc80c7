"""The weighted sum of task vectors, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype


def multi_task_vector(base: Tensor, tuned: Sequence[Tensor], weight: float | Sequence[float] = 1.0) -> Tensor:
    """Sum of weight * (tuned - base) in the order of the tasks, each product rounded before its add."""
    dtype = accumulation_dtype(base, *tuned)
    weights = [float(weight)] * len(tuned) if isinstance(weight, (int, float)) else weight
    total = torch.zeros(base.shape, dtype=dtype, device=base.device)
    for one, factor in zip(tuned, weights, strict=True):
        total = total + factor * (one.to(dtype) - base.to(dtype))
    return total

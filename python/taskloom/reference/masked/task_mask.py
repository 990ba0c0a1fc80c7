"""Which entries a task needs, in plain torch."""

from __future__ import annotations

from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.reference.masked.packed_mask import pack_mask


def task_mask(base: Tensor, tuned: Tensor, multi_task_vector: Tensor, tall_mask_lambda: float = 0.4) -> Tensor:
    """Bit i is set where |delta| > tall_mask_lambda * |multi_task_vector - delta|, delta = tuned - base; comparing with NaN is false."""
    dtype = accumulation_dtype(base, tuned, multi_task_vector)
    delta = tuned.to(dtype) - base.to(dtype)
    rest = multi_task_vector.to(dtype) - delta
    return pack_mask(delta.abs() > tall_mask_lambda * rest.abs())

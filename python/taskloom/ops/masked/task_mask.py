"""Which entries of the shared weights a task needs."""

from __future__ import annotations

import torch
from torch import Tensor

from taskloom.ops._backends import kernel
from taskloom.ops._checks import check_floating, check_floating_like, is_usual, packed_bytes
from taskloom.ops._register import register
from taskloom.reference import masked as reference


def task_mask(base: Tensor, tuned: Tensor, multi_task_vector: Tensor, tall_mask_lambda: float = 0.4) -> Tensor:
    """Mark the entries in which a task's own change outweighs what the other tasks add there.

    Bit i is set where ``|d| > tall_mask_lambda * |multi_task_vector - d|`` with ``d = tuned - base``. Adding ``multi_task_vector`` to
    ``base`` at these entries alone restores the task: :func:`masked_update` does that.

    Parameters
    ----------
    base
        Shared weights, of any shape; float32, bfloat16, float16 or float64.
    tuned
        The task's weights, of base's shape and any of these dtypes.
    multi_task_vector
        The sum of all tasks' changes, of base's shape and any of these dtypes; see :func:`multi_task_vector`.
    tall_mask_lambda
        How much the rest must stay below the task's own change, > 0; smaller keeps more entries, 1 minimises the L1 distance between
        the restored weights and ``tuned``. Default 0.4.

    Returns
    -------
    Tensor
        uint8 of shape ``[ceil(numel / 8)]``, as :func:`pack_mask` gives. The comparison is strict and made in float32 (float64 where a
        tensor is float64), each operation rounded; an entry with a NaN in it is not set.

    Raises
    ------
    TypeError
        If a tensor has another dtype, or ``tall_mask_lambda`` is no number.
    ValueError
        If the shapes differ, or ``tall_mask_lambda`` is not positive and finite.

    Notes
    -----
    Source: TALL-masks, Wang et al., ICML 2024, arXiv 2405.07813, equation 4. Not differentiable.
    """
    op = "task_mask"
    if not is_usual(base, (tuned, multi_task_vector)):
        check_floating(op, "base", base)
        check_floating_like(op, "tuned", tuned, base, "base")
        check_floating_like(op, "multi_task_vector", multi_task_vector, base, "base")
    if isinstance(tall_mask_lambda, bool) or not isinstance(tall_mask_lambda, (int, float)):
        raise TypeError(f"{op}: tall_mask_lambda: expected a number, got {type(tall_mask_lambda).__name__}")
    if not 0 < tall_mask_lambda < float("inf"):
        raise ValueError(f"{op}: tall_mask_lambda: expected a finite number > 0, got {tall_mask_lambda}")
    run = kernel(op, base, tuned, multi_task_vector)
    if run is None:
        return reference.task_mask(base, tuned, multi_task_vector, tall_mask_lambda)
    packed: Tensor = run(base, tuned, multi_task_vector, float(tall_mask_lambda))
    return packed


def _fake_task_mask(base: Tensor, tuned: Tensor, multi_task_vector: Tensor, tall_mask_lambda: float) -> Tensor:
    return base.new_empty((packed_bytes(base.numel()),), dtype=torch.uint8)


register("task_mask", fake=_fake_task_mask, discrete=True)

"""The sum of task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from taskloom.ops._backends import kernel
from taskloom.ops._checks import check_all_floating_like, check_floating, plain_number
from taskloom.ops._register import register
from taskloom.reference import masked as reference
from taskloom.reference.arithmetic import accumulation_dtype


def multi_task_vector(base: Tensor, tuned: Sequence[Tensor], weight: float | Sequence[float] = 1.0) -> Tensor:
    """Sum what the tasks changed: ``sum_t weight_t * (tuned_t - base)``, in one pass and without storing a difference.

    Parameters
    ----------
    base
        Shared weights, of any shape; float32, bfloat16, float16 or float64.
    tuned
        One tensor per task, at least one, each of base's shape and any of these dtypes.
    weight
        One number for all tasks, or one per task. Default 1.0: the plain sum, not the mean.

    Returns
    -------
    Tensor
        float32 (float64 where a tensor is float64) of base's shape, contiguous. The sum starts at 0 and takes the tasks in order, each
        product rounded before its add.

    Raises
    ------
    TypeError
        If a tensor has another dtype, or a weight is a tensor that requires grad.
    ValueError
        If there is no task, shapes differ, or there are not as many weights as tasks.

    Notes
    -----
    Source: task arithmetic, Ilharco et al., ICLR 2023, arXiv 2212.04089, section 2. Differentiable any number of times with respect to
    ``base`` and ``tuned``.
    """
    op = "multi_task_vector"
    check_floating(op, "base", base)
    tuned = list(tuned)
    if not tuned:
        raise ValueError(f"{op}: tuned: expected at least one tensor, got none")
    check_all_floating_like(op, "tuned", tuned, base, "base")
    weights = [weight] * len(tuned) if isinstance(weight, (int, float)) else list(weight)
    if len(weights) != len(tuned):
        raise ValueError(f"{op}: weight: expected one number or one for each of {len(tuned)} tasks, got {len(weights)}")
    weights = [plain_number(op, "weight", one) for one in weights]
    run = kernel(op, base, *tuned)
    if run is None:
        return reference.multi_task_vector(base, tuned, weights)
    total: Tensor = run(base, tuned, weights)
    return total


def _fake_multi_task_vector(base: Tensor, tuned: Sequence[Tensor], weight: Sequence[float]) -> Tensor:
    return base.new_empty(base.shape, dtype=accumulation_dtype(base, *tuned))


def _setup_multi_task_vector(ctx: Any, inputs: tuple[Tensor, Sequence[Tensor], Sequence[float]], output: Tensor) -> None:
    base, tuned, ctx.weight = inputs
    ctx.base_dtype, ctx.tuned_dtypes = base.dtype, [one.dtype for one in tuned]


def _multi_task_vector_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, list[Tensor | None], None]:
    for_base, for_tuned, _ = ctx.needs_input_grad
    base = (-sum(ctx.weight) * gradient).to(ctx.base_dtype) if for_base else None
    tuned = [
        (weight * gradient).to(dtype) if needed else None
        for weight, dtype, needed in zip(ctx.weight, ctx.tuned_dtypes, for_tuned, strict=True)
    ]
    return base, tuned, None


register("multi_task_vector", fake=_fake_multi_task_vector, backward=_multi_task_vector_backward, setup_context=_setup_multi_task_vector)

"""A linear map with low-rank adapters beside it: one adapter for each row, or the same weighted sum of adapters for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from taskloom.ops._backends import active_transform, kernel
from taskloom.ops._checks import cast_for_autocast, check_floating, check_shape
from taskloom.ops._register import implement_on_cpu, register
from taskloom.ops.lowrank import _products
from taskloom.ops.lowrank._factors import Numbers, adapter_weights
from taskloom.reference import lowrank as reference
from taskloom.reference.arithmetic import autocast_dtype

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _padded(op: str, name: str, factors: Tensor | Sequence[Tensor], dim: int) -> Tensor:
    """One factor of every adapter, stacked; ranks filled up with zeros, which add nothing."""
    if isinstance(factors, Tensor):
        return factors
    listed = list(factors)
    if not listed:
        raise ValueError(f"{op}: {name}: expected at least one factor, got none")
    for place, one in enumerate(listed):
        check_floating(op, f"{name}[{place}]", one)
        if one.dim() != 2 or one.shape[1 - dim] != listed[0].shape[1 - dim] or one.dtype != listed[0].dtype:
            raise ValueError(
                f"{op}: {name}[{place}]: expected {listed[0].dtype} and the shape of {name}[0] {tuple(listed[0].shape)} but for the rank, "
                f"got {one.dtype} {tuple(one.shape)}"
            )
    rank = max(one.shape[dim] for one in listed)
    pads = [(0, 0, 0, rank - one.shape[0]) if dim == 0 else (0, rank - one.shape[1]) for one in listed]
    return torch.stack([torch.nn.functional.pad(one, pad) for one, pad in zip(listed, pads, strict=True)])


def _check_factors(op: str, x: Tensor, A: Tensor, B: Tensor) -> None:
    check_floating(op, "x", x)
    check_floating(op, "A", A)
    check_floating(op, "B", B)
    if x.dim() == 0:
        raise ValueError(f"{op}: x: expected at least one dimension, got a scalar")
    if A.dim() != 3 or A.shape[2] != x.shape[-1]:
        raise ValueError(f"{op}: A: expected shape (T, r, {x.shape[-1]}) for x {tuple(x.shape)}, got {tuple(A.shape)}")
    if B.dim() != 3 or B.shape[0] != A.shape[0] or B.shape[2] != A.shape[1]:
        raise ValueError(f"{op}: B: expected shape ({A.shape[0]}, out, {A.shape[1]}) for A {tuple(A.shape)}, got {tuple(B.shape)}")


def _check_base(op: str, x: Tensor, B: Tensor, base: Tensor | None, bias: Tensor | None) -> None:
    for name, one, shape in (("base", base, (B.shape[1], x.shape[-1])), ("bias", bias, (B.shape[1],))):
        if one is None:
            continue
        check_floating(op, name, one)
        check_shape(op, name, one, shape, "the factors say")
        if one.dtype != x.dtype and (autocast_dtype(x) is None or torch.float64 in (one.dtype, x.dtype)):
            raise TypeError(f"{op}: {name}: expected {x.dtype} as x, got {one.dtype}")


def _row_tasks(op: str, task: Tensor, x: Tensor) -> Tensor:
    """The task of every row of x."""
    if not isinstance(task, Tensor) or task.dtype not in _INTEGERS:
        raise TypeError(f"{op}: task: expected a tensor of integers, got {task.dtype if isinstance(task, Tensor) else type(task).__name__}")
    leading = x.shape[:-1]
    if task.dim() > len(leading) or task.shape != leading[: task.dim()]:
        raise ValueError(f"{op}: task: expected shape {tuple(leading)} or a first part of it, as x has rows, got {tuple(task.shape)}")
    if task.dim() == len(leading) == 1:
        return task
    return task.reshape(task.shape + (1,) * (len(leading) - task.dim())).expand(leading).reshape(-1)


def _check_values(op: str, task: Tensor, tasks: int) -> None:
    """What the kernels look at themselves, for the reference; a transform has no values to look at."""
    if active_transform() is None and task.numel() and int(task.max()) >= tasks:
        raise ValueError(f"{op}: task: expected values below {tasks}, the number of adapters, got {int(task.max())}")


def lowrank_apply(
    x: Tensor,
    A: Tensor | Sequence[Tensor],
    B: Tensor | Sequence[Tensor],
    weight: Numbers = 1.0,
    task: Tensor | None = None,
    base: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float | Sequence[float] = 1.0,
) -> Tensor:
    """Apply a linear map with low-rank adapters beside it, without a dense update: ``x base^T + bias + weight_t * (x A_t^T) B_t^T``.

    Parameters
    ----------
    x
        Rows of shape ``[..., in]``; float32, bfloat16, float16 or float64. Under autocast they are cast as for a ``torch.nn.Linear``.
    A, B
        Factors of T adapters, ``[T, r, in]`` and ``[T, out, r]``, or two lists of ``[r_t, in]`` and ``[out, r_t]``, whose ranks are then
        filled up with zeros. Any of these dtypes.
    weight
        One number, one per adapter, or a floating-point tensor ``[T]`` or ``[]``, which may require grad. Default 1.0.
    task
        Integers: the adapter of each row, of x's leading shape or a first part of it (``[batch]`` for x ``[batch, length, in]``); negative
        for none. Default None: every row gets the sum of all adapters.
    base, bias
        ``[out, in]`` and ``[out]`` in x's dtype (under autocast they are cast to it); default None: only the adapters.
    scale
        Constant factor of the weight, one number or one per adapter: PEFT's ``lora_alpha / r``. Default 1.0.

    Returns
    -------
    Tensor
        ``[..., out]`` in x's dtype. The base's part is torch's own ``linear``, in x's dtype; the adapters' part is computed in float32
        (float64 where a tensor is float64) and added to it with one rounding. Rows without an adapter get the bits of the base's part.

    Raises
    ------
    TypeError
        If a tensor has another dtype.
    ValueError
        If shapes or counts do not fit, or ``task`` has a value from T on (on a GPU that is a device-side assertion, as in torch's own
        indexing).

    Notes
    -----
    Source: mixed batches as in Punica, Chen et al., MLSys 2024, arXiv 2310.18547; gradients as ICM-LoRA, arXiv 2501.17635, needs them;
    a coefficient for each adapter as aTLAS, arXiv 2407.02880, has it.

    Once differentiable with respect to x, A, B, ``weight``, base and bias; twice with ``taskloom.backend("reference")``. On a CPU rows are
    sorted by task once and each task's take two products of torch's own (bits may depend on the number of threads, as theirs do); on a GPU
    one Triton kernel keeps the inner r values of a row on chip. Adapters are never gathered per row.
    """
    op = "lowrank_apply"
    right, left = _padded(op, "A", A, 0), _padded(op, "B", B, 1)
    _check_factors(op, x, right, left)
    x = cast_for_autocast(x)
    _check_base(op, x, left, base, bias)
    weights = adapter_weights(op, weight, scale, len(right), x, right, left)
    rows = x.reshape(-1, x.shape[-1])
    tasks = () if task is None else (_row_tasks(op, task, x),)
    beside = [one for one in (base, bias) if one is not None]
    run = kernel(op, rows, right, left, weights, *tasks, *beside)
    chosen = tasks[0] if tasks else None
    if run is None:
        if chosen is not None:
            _check_values(op, chosen, len(right))
        cast = [None if one is None else one.to(x.dtype) for one in (base, bias)]
        y = reference.lowrank_apply(rows, right, left, weights, chosen, *cast)
    else:
        start = None
        if base is not None:
            start = torch.nn.functional.linear(rows, base, bias)
        elif bias is not None:
            start = bias.to(x.dtype).expand(len(rows), -1)
        y = run(rows, right, left, weights, chosen, start)
    return y.reshape(*x.shape[:-1], left.shape[1])


def lowrank_apply_backward(
    gradient: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    weight: Tensor,
    task: Tensor | None = None,
    needed: Sequence[bool] = (True, True, True, True),
) -> list[Tensor]:
    """The gradients of :func:`lowrank_apply`'s x (the adapters' part of it), A, B and weights.

    For the rows of task t, with g the output's gradient: ``dx = w_t (g B_t) A_t``, ``dA_t = w_t (g B_t)^T x``,
    ``dB_t = w_t g^T (x A_t^T)``, ``dw_t = <g B_t, x A_t^T>``.

    Parameters
    ----------
    gradient, x
        ``[N, out]`` and ``[N, in]``.
    A, B, weight, task
        ``[T, r, in]``, ``[T, out, r]``, float32 or float64 ``[T]``, and integers ``[N]`` or None.
    needed
        Whether each of the four is wanted. Default: all.

    Returns
    -------
    list of Tensor
        Those that are wanted, each in the dtype and shape of what it is the gradient of.

    Notes
    -----
    Source: ICM-LoRA, arXiv 2501.17635; this library. Not differentiable.
    """
    op = "lowrank_apply_backward"
    tensors = [x, A, B, weight] if task is None else [x, A, B, weight, task]
    run = kernel(op, gradient, *tensors)
    if run is None:
        return reference.lowrank_apply_backward(gradient, x, A, B, weight, task, needed)
    found: list[Tensor] = run(gradient, x, A, B, weight, task, list(needed))
    return found


def _fake_apply(x: Tensor, A: Tensor, B: Tensor, weight: Tensor, task: Tensor | None, start: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], B.shape[1]))


def _fake_apply_backward(
    gradient: Tensor, x: Tensor, A: Tensor, B: Tensor, weight: Tensor, task: Tensor | None, needed: Sequence[bool]
) -> list[Tensor]:
    return [one.new_empty(one.shape) for one, wanted in zip((x, A, B, weight), needed, strict=True) if wanted]


def _setup_apply(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None], output: Tensor) -> None:
    x, A, B, weight, task, start = inputs
    ctx.save_for_backward(x, A, B, weight, task)
    ctx.start_dtype = None if start is None else start.dtype


def _apply_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, A, B, weight, task = ctx.saved_tensors
    needed = [bool(one) for one in ctx.needs_input_grad[:4]]
    found = iter(ctx.ops.lowrank_apply_backward.default(gradient, x, A, B, weight, task, needed) if any(needed) else ())
    first = [next(found) if wanted else None for wanted in needed]
    start = gradient.to(ctx.start_dtype) if ctx.start_dtype is not None and ctx.needs_input_grad[5] else None
    return (*first, None, start)


implement_on_cpu("lowrank_apply", _products.lowrank_apply)
implement_on_cpu("lowrank_apply_backward", _products.lowrank_apply_backward)
register("lowrank_apply", fake=_fake_apply, backward=_apply_backward, setup_context=_setup_apply)
register("lowrank_apply_backward", fake=_fake_apply_backward)

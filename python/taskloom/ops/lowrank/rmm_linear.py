"""A batch that mixes tasks, each row through its own task's adapter, from shared bases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from taskloom.ops._backends import active_transform, kernel
from taskloom.ops._checks import check_floating
from taskloom.ops._register import implement_on_cpu, register
from taskloom.ops.lowrank._positions import check_positions
from taskloom.reference import lowrank as reference
from taskloom.reference.arithmetic import accumulation_dtype, without_autocast
from taskloom.reference.lowrank.rmm import rmm_inner


def _check(op: str, x: Tensor, task: Tensor, a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]) -> None:
    check_floating(op, "x", x)
    if x.dim() != 2:
        raise ValueError(f"{op}: x: expected shape [N, d], got {tuple(x.shape)}")
    if not isinstance(task, Tensor):
        raise TypeError(f"{op}: task: expected a tensor, got {type(task).__name__}")
    if task.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: task: expected int64 or int32, got {task.dtype}")
    if task.shape != x.shape[:1]:
        raise ValueError(f"{op}: task: expected shape ({x.shape[0]},), one for each row of x, got {tuple(task.shape)}")
    for side, tensors in (("a", a), ("b", b)):
        names = (f"mean_{side}", f"basis_{side}", f"coef_{side}")
        check_positions(op, *tensors, names)
        if tensors[2].dim() != 3:
            raise ValueError(f"{op}: {names[2]}: expected shape [n, P, p], got {tuple(tensors[2].shape)}")
    if x.shape[1] != b[0].shape[0]:
        raise ValueError(f"{op}: mean_b: expected {x.shape[1]} positions as x has columns, got {b[0].shape[0]}")
    for name, mine, theirs in (
        ("mean_b: expected rank", b[0].shape[1], a[0].shape[1]),
        ("coef_b: expected tasks", b[2].shape[0], a[2].shape[0]),
    ):
        if mine != theirs:
            raise ValueError(f"{op}: {name} {theirs} as {name[:4]}_a, got {mine}")


def _check_tasks(op: str, task: Tensor, tasks: int) -> None:
    wrong = (task < 0) | (task >= tasks)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"{op}: task: expected 0 to {tasks - 1}, got {int(task[row])} at row {row}") from None


def rmm_linear(
    x: Tensor,
    task: Tensor,
    mean_a: Tensor,
    basis_a: Tensor,
    coef_a: Tensor,
    mean_b: Tensor,
    basis_b: Tensor,
    coef_b: Tensor,
) -> Tensor:
    """Multiply each row by its own task's adapter, ``x (A_t B_t)^T``, without forming the adapter of any task.

    Parameters
    ----------
    x
        Shape ``[N, d]``; float32, bfloat16, float16 or float64.
    task
        int64 or int32 of shape ``[N]``: each row's task, 0 to n - 1.
    mean_a, basis_a, coef_a
        Shapes ``[m, r]``, ``[m, p, r]`` and ``[n, m, p]``: what :func:`rmm_fit` gives for the rows of the tasks' A [m, r].
    mean_b, basis_b, coef_b
        Shapes ``[d, r]``, ``[d, p, r]`` and ``[n, d, p]``: the same of the columns of B [r, d]; its p may be another.

    Returns
    -------
    Tensor
        Shape ``[N, m]`` in x's dtype, summed in float32 (float64 where a tensor is float64) and rounded once.

    Raises
    ------
    TypeError
        If a tensor has another dtype.
    ValueError
        If shapes or devices do not fit, or a row's task is none of the n (in compiled code RuntimeError; on a GPU that is a device-side
        assertion, as in torch's own indexing).

    Notes
    -----
    Source: this library; the model is that of reversible model merging, arXiv 2510.14163. ``h = x M_b + sum_k (x * coef_b[t, :, k])
    W_bk`` and ``y = h M_a^T + sum_k (h W_ak^T) * coef_a[t, :, k]``: the bases are read once for all tasks, p + 1 products on each side.
    For rows of one task :func:`rmm_reconstruct` and a plain low-rank product do less work.

    Differentiable any number of times with respect to x and to means, bases and coefficients.
    """
    op = "rmm_linear"
    a, b = (mean_a, basis_a, coef_a), (mean_b, basis_b, coef_b)
    _check(op, x, task, a, b)
    run = kernel(op, x, task, *a, *b)
    y: Tensor
    if run is None:
        if active_transform() is None:
            _check_tasks(op, task, len(coef_a))
        y = reference.rmm_linear(x, task, *a, *b)
        return y
    try:
        y = run(x, task, *a, *b)
    except RuntimeError:
        # The kernel looks at every task anyway, before it computes.
        _check_tasks(op, task, len(coef_a))
        raise
    return y


def check_task_range(task: Tensor, tasks: int) -> None:
    """Raise RuntimeError unless every task is one of ``tasks``."""
    if task.numel() and not bool(((task >= 0) & (task < tasks)).all()):
        raise RuntimeError(f"task: expected 0 to {tasks - 1} at every row")


def _rmm_linear_cpu(x: Tensor, task: Tensor, *parts: Tensor) -> Tensor:
    check_task_range(task, parts[2].shape[0])
    return reference.rmm_linear(x, task, *parts)


def _fake_rmm_linear(
    x: Tensor, task: Tensor, mean_a: Tensor, basis_a: Tensor, coef_a: Tensor, mean_b: Tensor, basis_b: Tensor, coef_b: Tensor
) -> Tensor:
    return x.new_empty((x.shape[0], mean_a.shape[0]))


def _setup_rmm_linear(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


@without_autocast
def _positions_gradients(
    outer: Tensor, task: Tensor, inner: Tensor, basis: Tensor, coefficients: Tensor, needed: tuple[bool, bool, bool]
) -> list[Tensor | None]:
    """Gradients of mean, basis and coefficients where row s has the gradient ``outer[s, q] inner[s]`` for its task's vector at q."""
    for_mean, for_basis, for_coefficients = needed
    dtype = outer.dtype
    found: list[Tensor | None] = [outer.T @ inner if for_mean else None, None, None]
    ranks = range(basis.shape[1])
    if for_basis:
        scaled = [(outer * coefficients[task, :, k].to(dtype)).T @ inner for k in ranks]
        found[1] = torch.stack(scaled, 1)
    if for_coefficients:
        each = [outer * (inner @ basis[:, k].to(dtype).T) for k in ranks]
        zeros = outer.new_zeros(coefficients.shape[:2])
        found[2] = torch.stack([zeros.index_add(0, task, one) for one in each], 2)
    return found


def _rmm_linear_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, task, mean_a, basis_a, coef_a, mean_b, basis_b, coef_b = ctx.saved_tensors
    needed = ctx.needs_input_grad
    dtype = accumulation_dtype(x, *ctx.saved_tensors[2:])
    chosen = task.long()
    for_x = None
    if needed[0]:
        # x meets B first and A last, its gradient the other way round.
        for_x = ctx.ops.rmm_linear.default(gradient, task, mean_b, basis_b, coef_b, mean_a, basis_a, coef_a)
    found: list[Tensor | None] = [None] * 6
    if any(needed[2:5]):
        inner = rmm_inner(x, chosen, mean_b, basis_b, coef_b, dtype)
        found[:3] = _positions_gradients(gradient.to(dtype), chosen, inner, basis_a, coef_a, needed[2:5])
    if any(needed[5:8]):
        inner = rmm_inner(gradient, chosen, mean_a, basis_a, coef_a, dtype)
        found[3:] = _positions_gradients(x.to(dtype), chosen, inner, basis_b, coef_b, needed[5:8])
    parts = [None if one is None else one.to(own.dtype) for one, own in zip(found, ctx.saved_tensors[2:], strict=True)]
    return for_x, None, *parts


implement_on_cpu("rmm_linear", _rmm_linear_cpu)
register("rmm_linear", fake=_fake_rmm_linear, backward=_rmm_linear_backward, setup_context=_setup_rmm_linear)

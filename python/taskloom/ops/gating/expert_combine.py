"""Experts' outputs weighed and added up per token."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from taskloom.ops._backends import kernel
from taskloom.ops._checks import check_floating, check_shape
from taskloom.ops._register import register
from taskloom.ops.gating._indices import check_indices, check_values, run_checked
from taskloom.reference import gating as reference


def _check(op: str, y: Tensor, weight: Tensor, inverse: Tensor) -> None:
    check_floating(op, "y", y)
    check_floating(op, "weight", weight)
    check_indices(op, "inverse", inverse)
    if weight.dim() == 0:
        raise ValueError(f"{op}: weight: expected shape [..., k], got ()")
    if y.dim() != 2 or y.shape[0] != weight.numel():
        raise ValueError(f"{op}: y: expected shape [{weight.numel()}, D], a row for each entry of weight, got {tuple(y.shape)}")
    check_shape(op, "inverse", inverse, weight.shape, "weight")


def _check_rows(op: str, y: Tensor, inverse: Tensor) -> None:
    check_values(op, "inverse", inverse, 0, y.shape[0], "a row of y")


def check_rows_once(op: str, y: Tensor, inverse: Tensor) -> None:
    """Raise ValueError also where a row is named again; only on the CPU, for a GPU would have to be waited for."""
    _check_rows(op, y, inverse)
    rows = inverse.reshape(-1).long()
    if not rows.is_cpu or rows.numel() == rows.unique().numel():
        return
    in_order, entries = torch.sort(rows, stable=True)
    again = int(entries[1:][in_order[1:] == in_order[:-1]].min())
    raise ValueError(f"{op}: inverse: expected each row of y once, got {int(rows[again])} again at entry {again}")


def expert_combine(y: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """Add up what the experts made of each token: ``out[t] = sum_s weight[t, s] * y[inverse[t, s]]``, slots in order.

    Parameters
    ----------
    y
        ``[T * k, D]``: the experts' outputs in the order of :func:`taskloom.expert_sort`; float32, bfloat16, float16 or float64.
    weight
        ``[..., k]`` of any of these dtypes, T tokens in all: the weights of :func:`taskloom.topk_gate`.
    inverse
        weight's shape, int32 or int64: where each slot's row is, each row once; the ``inverse`` of :func:`taskloom.expert_sort`.

    Returns
    -------
    Tensor
        ``[..., D]`` in y's dtype; products and sums in float32 (float64 where a tensor is float64), rounded once.

    Raises
    ------
    TypeError
        If a tensor has another dtype.
    ValueError
        If shapes do not fit, or inverse names no row of y (on a GPU that is a device-side assertion, in compiled code a RuntimeError).

    Notes
    -----
    Source: the sum over experts of a sparse mixture, as in Shazeer et al., arXiv 1701.06538; the form of the kernel is this library's. A
    token's sum is gathered, never scattered: there are no atomics, and a row does not depend on the batch that it is in.

    Differentiable once with respect to y and weight; twice with ``taskloom.backend("reference")``. Backward keeps the inputs only: it
    writes each row of y's gradient once, and takes weight's from dot products of rows. On the CPU the bits do not depend on the number of
    threads or the CPU level.
    """
    op = "expert_combine"
    _check(op, y, weight, inverse)
    check = partial(_check_rows, op, y, inverse)
    run = kernel(op, y, weight, inverse)
    if run is None:
        check()
        return reference.expert_combine(y, weight, inverse)
    out: Tensor = run_checked(run, check, y, weight, inverse)
    return out


def expert_combine_backward(
    gradient: Tensor, y: Tensor, weight: Tensor, inverse: Tensor, *, for_y: bool = True, for_weight: bool = True
) -> tuple[Tensor, Tensor]:
    """The gradients of :func:`expert_combine`.

    Parameters
    ----------
    gradient
        ``[..., D]``: as the op's result.
    y, weight, inverse
        As in the op.
    for_y, for_weight
        Which gradients are wanted. Default: both.

    Returns
    -------
    dy, dweight : Tensor
        In the shapes and dtypes of y and weight; empty where not wanted.

    Raises
    ------
    TypeError, ValueError
        As the op; and on the CPU a ValueError where dy is wanted and inverse names a row of y twice, so that another would have none;
        on a GPU, where nobody waits to say so, a row that is not named gets 0.

    Notes
    -----
    Source: this library. Not differentiable.
    """
    op = "expert_combine_backward"
    _check(op, y, weight, inverse)
    check_floating(op, "gradient", gradient)
    check_shape(op, "gradient", gradient, (*weight.shape[:-1], y.shape[1]), "the op's result")
    check = partial(check_rows_once if for_y else _check_rows, op, y, inverse)
    run = kernel(op, gradient, y, weight, inverse)
    if run is None:
        check()
        return reference.expert_combine_backward(gradient, y, weight, inverse, for_y, for_weight)
    found: tuple[Tensor, Tensor] = run_checked(run, check, gradient, y, weight, inverse, for_y, for_weight)
    return found


def _fake_combine(y: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    return y.new_empty((*weight.shape[:-1], y.shape[1]))


def _fake_backward(gradient: Tensor, y: Tensor, weight: Tensor, inverse: Tensor, for_y: bool, for_weight: bool) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape if for_y else (0,)), weight.new_empty(weight.shape if for_weight else (0,))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    wanted = tuple(bool(one) for one in ctx.needs_input_grad[:2])
    found = ctx.ops.expert_combine_backward.default(gradient, *ctx.saved_tensors, *wanted)
    return (*(one if want else None for one, want in zip(found, wanted, strict=True)), None)


register("expert_combine", fake=_fake_combine, backward=_backward, setup_context=_setup)
register("expert_combine_backward", fake=_fake_backward)

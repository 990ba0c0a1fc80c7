"""Weighed squared distances of rows to their neighbours in a table."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, is_grad_enabled

from taskloom.ops._backends import kernel
from taskloom.ops._checks import check_floating, check_shape
from taskloom.ops._register import register
from taskloom.ops.gating._indices import check_indices, check_values, run_checked
from taskloom.reference import gating as definition
from taskloom.reference.arithmetic import accumulation_dtype


def _check(op: str, r: Tensor, reference: Tensor, ids: Tensor, weight: Tensor) -> None:
    for name, tensor in (("r", r), ("reference", reference), ("weight", weight)):
        check_floating(op, name, tensor)
    check_indices(op, "ids", ids)
    if r.dim() != 2:
        raise ValueError(f"{op}: r: expected shape [B, R], got {tuple(r.shape)}")
    if reference.dim() != 2 or reference.shape[1] != r.shape[1]:
        raise ValueError(f"{op}: reference: expected shape [n_ref, {r.shape[1]}], rows as those of r, got {tuple(reference.shape)}")
    if ids.dim() != 2 or ids.shape[0] != r.shape[0]:
        raise ValueError(f"{op}: ids: expected shape [{r.shape[0]}, k], neighbours of each row of r, got {tuple(ids.shape)}")
    check_shape(op, "weight", weight, ids.shape, "ids")


def _check_rows(op: str, reference: Tensor, ids: Tensor) -> partial[None]:
    return partial(check_values, op, "ids", ids, -1, reference.shape[0], "a row of reference or -1 for none")


def manifold_loss(r: Tensor, reference: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """The weighed squared distance of each row to its neighbours: ``sum_j weight[b, j] * |r[b] - reference[ids[b, j]]|^2``.

    Parameters
    ----------
    r
        ``[B, R]``: routing vectors; float32, bfloat16, float16 or float64.
    reference
        ``[n_ref, R]`` of any of these dtypes: a table of such vectors, constants. Only the rows that ids name are read, where they lie.
    ids
        ``[B, k]``, int32 or int64: each row's neighbours in the table; -1 for none.
    weight
        ``[B, k]`` of any of these dtypes, constants; 0 for no neighbour. In RoMA those of a row add up to 1, or are 0 where it has no
        neighbours: such a row's loss and gradient are 0.

    Returns
    -------
    Tensor
        ``[B]``, float32, or float64 where a tensor is float64.

    Raises
    ------
    TypeError
        If a tensor has another dtype.
    ValueError
        If shapes do not fit, or an id is out of range (on a GPU that is a device-side assertion, in compiled code a RuntimeError).
    RuntimeError
        If reference or weight requires grad: they get none.

    Notes
    -----
    Source: RoMA, arXiv 2511.07419, equations 6 and 7. ``[B, k, R]`` is never made, neither forward nor backward; backward keeps the inputs
    only.

    Differentiable once with respect to r; twice with ``taskloom.backend("reference")``. On the CPU the bits do not depend on the number of
    threads or the CPU level.
    """
    op = "manifold_loss"
    _check(op, r, reference, ids, weight)
    if is_grad_enabled() and (reference.requires_grad or weight.requires_grad):
        name = "reference" if reference.requires_grad else "weight"
        raise RuntimeError(f"{op}: {name}: expected a constant, got a tensor that requires grad; the op has a gradient for r only")
    check = _check_rows(op, reference, ids)
    run = kernel(op, r, reference, ids, weight)
    if run is None:
        check()
        return definition.manifold_loss(r, reference, ids, weight)
    loss: Tensor = run_checked(run, check, r, reference, ids, weight)
    return loss


def manifold_loss_backward(gradient: Tensor, r: Tensor, reference: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """The gradient of :func:`manifold_loss`: ``2 * gradient[b] * sum_j weight[b, j] * (r[b] - reference[ids[b, j]])``.

    Parameters
    ----------
    gradient
        ``[B]``.
    r, reference, ids, weight
        As in the op.

    Returns
    -------
    Tensor
        ``[B, R]`` in r's dtype.

    Raises
    ------
    TypeError, ValueError
        As the op.

    Notes
    -----
    Source: this library. Not differentiable.
    """
    op = "manifold_loss_backward"
    _check(op, r, reference, ids, weight)
    check_floating(op, "gradient", gradient)
    check_shape(op, "gradient", gradient, r.shape[:1], "the op's result")
    check = _check_rows(op, reference, ids)
    run = kernel(op, gradient, r, reference, ids, weight)
    if run is None:
        check()
        return definition.manifold_loss_backward(gradient, r, reference, ids, weight)
    dr: Tensor = run_checked(run, check, gradient, r, reference, ids, weight)
    return dr


def _fake_loss(r: Tensor, reference: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    return r.new_empty(r.shape[:1], dtype=accumulation_dtype(r, reference, weight))


def _fake_backward(gradient: Tensor, r: Tensor, reference: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    return r.new_empty(r.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return ctx.ops.manifold_loss_backward.default(gradient, *ctx.saved_tensors), None, None, None


register("manifold_loss", fake=_fake_loss, backward=_backward, setup_context=_setup)
register("manifold_loss_backward", fake=_fake_backward)

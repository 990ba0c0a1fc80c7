"""A linear layer whose weight is a base plus a kernel's merge of two thin factors, and is not kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from taskloom.ops._backends import choose, kernels
from taskloom.ops._checks import cast_for_autocast, check_floating
from taskloom.ops._register import register
from taskloom.ops.lowrank._kernel_arguments import check_base, kernel_arguments
from taskloom.ops.lowrank.kernel_merge import as_given, fake_gradients, fake_statistics
from taskloom.reference import lowrank as reference
from taskloom.reference.arithmetic import accumulation_dtype


def _check_input(op: str, x: Tensor, n: int) -> None:
    check_floating(op, "x", x)
    if x.dim() == 0 or x.shape[-1] != n:
        raise ValueError(f"{op}: x: expected a last dimension of {n}, the rows of A, got shape {tuple(x.shape)}")


def kernel_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    coef: Tensor,
    *,
    kernel: str = "mixk",
    alpha: float | Tensor | None = None,
    gamma: float | Tensor | None = None,
    beta: float | Tensor | None = None,
    sparsity: float = 0.0,
    gate: str | None = "magnitude",
    base: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Apply the matrix of :func:`kernel_merge` to inputs: ``x W^T + bias`` with ``W = kernel_merge(A, B, coef, ..., base=base)``.

    Parameters
    ----------
    x
        Inputs ``[..., n]``; float32, bfloat16, float16 or float64. Under autocast they are cast as for a ``torch.nn.Linear``.
    A, B, coef, kernel, alpha, gamma, beta, sparsity, gate
        As of :func:`kernel_merge`.
    base
        ``[m, n]``, the frozen weight. Default None: the merge of the factors alone.
    bias
        ``[m]``. Default None.

    Returns
    -------
    Tensor
        ``[..., m]`` in the dtype of x. On a CPU everything before is float32 (float64 where a tensor is float64). On a GPU the products are
        torch's, of matrices in the dtype of x; where that is 16 bits, base and merge are multiplied one after the other, so that an update
        smaller than the base's rounding is not lost.

    Raises
    ------
    TypeError, ValueError
        As :func:`kernel_merge`, or if x or bias does not fit.

    Notes
    -----
    Source: SNELL and SNELLA, whose official code keeps six matrices of the weight's size or computes them twice. Here the backward keeps x,
    the factors, the threshold and two values per row of A; the weight is made in a buffer that is used again, and so is its gradient.

    Differentiable once with respect to x, A, B, coef, alpha, gamma, beta, base and bias.
    """
    op = "kernel_linear"
    given = kernel_arguments(op, A, B, coef, kernel, alpha, gamma, beta, sparsity, gate, x, base, bias)
    _check_input(op, x, A.shape[1])
    check_base(op, base, B.shape[1], A.shape[1])
    if bias is not None:
        check_floating(op, "bias", bias)
        if bias.shape != (B.shape[1],):
            raise ValueError(f"{op}: bias: expected shape ({B.shape[1]},), the rows of B, got {tuple(bias.shape)}")
    x = cast_for_autocast(x)
    chosen = choose(op, x, *given.given, *(one for one in (base, bias) if one is not None))
    if chosen == "reference":
        scalars = (given.alpha, given.gamma, given.beta)
        return reference.kernel_linear(x, A, B, coef, kernel, *scalars, given.sparsity, gate, base, bias)
    y: Tensor = kernels(chosen).kernel_linear.default(x, *given.tensors, base, bias, kernel, given.sparsity, given.gate_name)[0]
    return y


def kernel_linear_backward(
    gradient: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    coef: Tensor,
    threshold: Tensor,
    row_stats: Tensor,
    *,
    kernel: str = "mixk",
    alpha: float | Tensor | None = None,
    gamma: float | Tensor | None = None,
    beta: float | Tensor | None = None,
    gate: str | None = "magnitude",
    base: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of :func:`kernel_linear`, all of them.

    Parameters
    ----------
    gradient
        Of the outputs, ``[..., m]``.
    x, A, B, coef, kernel, alpha, gamma, beta, gate, base
        As of :func:`kernel_linear`.
    threshold, row_stats
        As of :func:`taskloom.ops.lowrank.kernel_merge_backward`.

    Returns
    -------
    tuple of Tensor
        Gradients of x (in its dtype), of A, B, coef, (alpha, gamma, beta) and of the merged weight, in the dtype of the arithmetic.

    Raises
    ------
    TypeError, ValueError
        As :func:`kernel_linear`.

    Notes
    -----
    Source: this library. Not differentiable.
    """
    op = "kernel_linear_backward"
    given = kernel_arguments(op, A, B, coef, kernel, alpha, gamma, beta, 0.0, gate, threshold)
    _check_input(op, x, A.shape[1])
    check_base(op, base, B.shape[1], A.shape[1])
    check_floating(op, "gradient", gradient)
    if gradient.shape != (*x.shape[:-1], B.shape[1]):
        raise ValueError(f"{op}: gradient: expected shape {(*x.shape[:-1], B.shape[1])}, got {tuple(gradient.shape)}")
    chosen = choose(op, gradient, x, *given.given, threshold, row_stats, *([] if base is None else [base]))
    if chosen == "reference":
        scalars = (given.alpha, given.gamma, given.beta)
        return reference.kernel_linear_backward(gradient, x, A, B, coef, threshold, kernel, *scalars, gate, base)
    found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] = kernels(chosen).kernel_linear_backward.default(
        gradient, x, *given.tensors, base, threshold, row_stats, kernel, given.gate_name, True, True, True
    )
    return found


def _fake_kernel_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    coef: Tensor,
    alpha: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    base: Tensor | None,
    bias: Tensor | None,
    kernel: str,
    sparsity: float,
    gate: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(x, A, B, coef, alpha, gamma, beta, base, bias)
    return x.new_empty((*x.shape[:-1], B.shape[1])), *fake_statistics(A, dtype, kernel)


def _fake_kernel_linear_backward(
    gradient: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    coef: Tensor,
    alpha: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    base: Tensor | None,
    threshold: Tensor,
    row_stats: Tensor,
    kernel: str,
    gate: str,
    for_x: bool,
    for_base: bool,
    for_factors: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(A, B, coef, alpha, gamma, beta, threshold)
    none = A.new_empty((0,), dtype=dtype)
    thin = fake_gradients(A, B, coef, dtype) if for_factors else tuple(torch.empty_like(none) for _ in range(4))
    a, b, c, scalars = thin
    for_weight = A.new_empty((B.shape[1], A.shape[1]), dtype=dtype) if for_base else none
    return x.new_empty(x.shape if for_x else (0,)), a, b, c, scalars, for_weight


def _setup_kernel_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, *factors, base, bias, kernel, _, gate = inputs
    _, threshold, row_stats = output
    ctx.mark_non_differentiable(threshold, row_stats)
    ctx.save_for_backward(x, *factors, base, threshold, row_stats)
    ctx.kernel, ctx.gate = kernel, gate
    ctx.bias_dtype = None if bias is None else bias.dtype


def _kernel_linear_backward(ctx: Any, gradient: Tensor, *of_statistics: Tensor | None) -> tuple[Tensor | None, ...]:
    x, *factors, base, threshold, row_stats = ctx.saved_tensors
    for_x, *for_thin, for_base, for_bias = ctx.needs_input_grad[:9]
    thin: tuple[Tensor | None, ...] = (None,) * 6
    for_input: Tensor | None = None
    for_weight: Tensor | None = None
    for_offset: Tensor | None = None
    if for_x or for_base or any(for_thin):
        for_input, *found, for_weight = ctx.ops.kernel_linear_backward.default(
            gradient, x, *factors, base, threshold, row_stats, ctx.kernel, ctx.gate, for_x, for_base, any(for_thin)
        )
        if any(for_thin):
            thin = as_given(tuple(found), tuple(factors), tuple(for_thin))
    if for_bias:
        wide = torch.float64 if ctx.bias_dtype == torch.float64 else torch.float32
        for_offset = gradient.reshape(-1, gradient.shape[-1]).sum(0, dtype=wide).to(ctx.bias_dtype)
    weight = for_weight.to(base.dtype) if for_base and for_weight is not None else None
    return for_input if for_x else None, *thin, weight, for_offset, None, None, None


register("kernel_linear", fake=_fake_kernel_linear, backward=_kernel_linear_backward, setup_context=_setup_kernel_linear)
register("kernel_linear_backward", fake=_fake_kernel_linear_backward)

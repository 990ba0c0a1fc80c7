"""A full-rank sparse matrix made of two thin factors by a kernel, and added to a base, without a second matrix of its size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from taskloom.ops._backends import choose, kernels
from taskloom.ops._checks import check_floating, mark_changed
from taskloom.ops._register import register
from taskloom.ops.lowrank._kernel_arguments import check_base, check_out, kernel_arguments
from taskloom.reference import lowrank as reference
from taskloom.reference.arithmetic import accumulation_dtype


def kernel_quantile(
    A: Tensor,
    B: Tensor,
    coef: Tensor,
    *,
    kernel: str = "mixk",
    alpha: float | Tensor | None = None,
    gamma: float | Tensor | None = None,
    beta: float | Tensor | None = None,
    sparsity: float = 0.0,
    gate: str = "magnitude",
) -> Tensor:
    """The threshold that :func:`kernel_merge` gates by: an exact quantile of the magnitudes of a matrix that is never stored.

    Parameters
    ----------
    A, B, coef, kernel, alpha, gamma, beta, sparsity
        As of :func:`kernel_merge`.
    gate
        ``"magnitude"`` (the default) and ``"hard"``: the quantile with linear interpolation between order statistics, to the bit that of
        :func:`torch.quantile` up to 2^24 entries; beyond, where that refuses, with its rank in float64. ``"soft"``: the
        ``ceil(sparsity N)``-th smallest magnitude, 0 where that is none.

    Returns
    -------
    Tensor
        A scalar on the factors' device, float32, or float64 where a tensor is float64. NaN where an entry is NaN, 0 of no entries.

    Raises
    ------
    TypeError, ValueError
        As :func:`kernel_merge`.

    Notes
    -----
    Source: this library; a radix selection over the bits of the magnitudes, whose passes make the entries anew: no sort, and no wait of the
    host for a GPU. No gradient flows through a threshold.
    """
    op = "kernel_quantile"
    if gate is None:
        raise ValueError(f"{op}: gate: expected magnitude, soft or hard, got None, which has no threshold")
    given = kernel_arguments(op, A, B, coef, kernel, alpha, gamma, beta, sparsity, gate)
    chosen = choose(op, *given.given)
    if chosen == "reference":
        return reference.kernel_quantile(A, B, coef, kernel, given.alpha, given.gamma, given.beta, given.sparsity, gate).detach()
    detached = [None if one is None else one.detach() for one in given.tensors]
    threshold: Tensor = kernels(chosen).kernel_quantile.default(*detached, kernel, given.sparsity, given.gate_name)
    return threshold


def kernel_merge(
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
    out: Tensor | None = None,
) -> Tensor:
    """Merge two thin factors into a matrix by a kernel, sparsify it by its magnitudes, and add it to a base.

    Parameters
    ----------
    A
        Factor of the inputs, ``[P, n, K]``: P chunks of K columns, P K being what is called the rank. float32, bfloat16, float16, float64.
    B
        Factor of the outputs, ``[P, m, K]``.
    coef
        ``[P]``: a weight per chunk; kernels sigmoid and rbf take a row's chunks as one vector and have no use for it.
    kernel
        What row i of A and row j of B give, E[i, j]:

        - ``"linear"``: sum_p c_p a_p.b_p (LoRA, of rank P K);
        - ``"pwl"``: M = sum_p c_p |a_p - b_p|, SNELL's;
        - ``"mixk"`` (the default): M + alpha softmax_j(M / gamma) + beta, SNELLA's;
        - ``"sigmoid"``: alpha / (1 + exp(-beta a.b)) + gamma;
        - ``"rbf"``: alpha exp(-beta |a - b|^2) + gamma.
    alpha, gamma, beta
        Numbers, or tensors of one value that may require grad. Default None: mixk 1, 1, 0, sigmoid and rbf 1, 0, 1. Kernels without them
        take None only.
    sparsity
        The quantile of |E| that the gate takes as its threshold tau, 0 to 1. Default 0.
    gate
        What is made of E: ``"magnitude"`` (the default) E |E| where |E| > tau, else 0; ``"soft"`` E (|E| - tau) there; ``"hard"`` E
        there; None E everywhere. The comparison is strict: with ties none of them is kept, and sparsity 0 drops the smallest entry.
    base
        ``[m, n]``, the frozen weight of a ``torch.nn.Linear``. Default None: nothing is added.
    out
        A contiguous ``[m, n]`` tensor of the result's dtype that the merge is written to and that is returned; it may be base itself, and
        must not share memory with anything else. Default None: a new tensor.

    Returns
    -------
    Tensor
        ``[m, n]``: base plus the transpose of the gated E, computed in float32 (float64 where a tensor is float64) and rounded once, to the
        dtype of base, or of A without one. Nothing else of that size is made, or kept for the backward.

    Raises
    ------
    TypeError
        If a tensor is not of these dtypes, or sparsity or a scalar is no number.
    ValueError
        If shapes do not fit, sparsity is not in [0, 1], there is no such kernel or gate, gamma is 0 (on GPUs that gives NaN), or tensors
        are on different devices, or ``out`` is not contiguous or shares memory with an argument, base itself excepted.
    RuntimeError
        If ``out`` is given and a tensor requires grad while gradients are recorded.

    Notes
    -----
    Source: SNELL (NeurIPS 2024, arXiv 2411.01800) and SNELLA (arXiv 2510.24037), with the gate of their code as ``"magnitude"`` and that
    of equation 5 as ``"soft"``. Distances are sums of squared differences, never taken apart from products.

    Differentiable once with respect to A, B, coef, alpha, gamma, beta and base. tau is a constant, and so is the factor |E| of
    ``"magnitude"``. Coincident rows give a distance gradient of 0. Gradients are bitwise the same in every run on one device, for any
    number of threads.
    """
    op = "kernel_merge"
    given = kernel_arguments(op, A, B, coef, kernel, alpha, gamma, beta, sparsity, gate, base)
    check_base(op, base, B.shape[1], A.shape[1])
    start = () if base is None else (base,)
    if out is not None:
        check_out(op, out, given, base)
        chosen = choose("kernel_merge_out", *given.given, *start, out)
        if chosen == "reference":
            scalars = (given.alpha, given.gamma, given.beta)
            return out.copy_(reference.kernel_merge(A, B, coef, kernel, *scalars, given.sparsity, gate, base))
        kernels(chosen).kernel_merge_out.default(*given.tensors, base, kernel, given.sparsity, given.gate_name, out)
        mark_changed(out)
        return out
    chosen = choose(op, *given.given, *start)
    if chosen == "reference":
        return reference.kernel_merge(A, B, coef, kernel, given.alpha, given.gamma, given.beta, given.sparsity, gate, base)
    merged: Tensor = kernels(chosen).kernel_merge.default(*given.tensors, base, kernel, given.sparsity, given.gate_name)[0]
    return merged


def kernel_merge_backward(
    gradient: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of :func:`kernel_merge`'s factors and scalars, without a matrix of the gradient's size.

    Parameters
    ----------
    gradient
        Of the merged matrix, ``[m, n]``; float32, bfloat16, float16 or float64.
    A, B, coef, kernel, alpha, gamma, beta, gate
        As of :func:`kernel_merge`.
    threshold
        The threshold of the forward, a scalar in the dtype of the arithmetic.
    row_stats
        For mixk ``[2, n]``: the largest M / gamma of each row i over j, and the sum of the exponentials of their differences from it; for
        other kernels empty.

    Returns
    -------
    tuple of Tensor
        Gradients of A, of B, of coef, and of (alpha, gamma, beta) as ``[3]``; in the dtype of the arithmetic, 0 for what the kernel lacks.

    Raises
    ------
    TypeError, ValueError
        As :func:`kernel_merge`.

    Notes
    -----
    Source: this library. Not differentiable.
    """
    op = "kernel_merge_backward"
    given = kernel_arguments(op, A, B, coef, kernel, alpha, gamma, beta, 0.0, gate, threshold)
    check_floating(op, "gradient", gradient)
    if gradient.shape != (B.shape[1], A.shape[1]):
        raise ValueError(f"{op}: gradient: expected shape {(B.shape[1], A.shape[1])}, got {tuple(gradient.shape)}")
    rows = (2, A.shape[1]) if kernel == "mixk" else (0,)
    if row_stats.shape != rows:
        raise ValueError(f"{op}: row_stats: expected shape {rows}, got {tuple(row_stats.shape)}")
    if threshold.dim() != 0:
        raise ValueError(f"{op}: threshold: expected a scalar, got shape {tuple(threshold.shape)}")
    chosen = choose(op, gradient, *given.given, threshold, row_stats)
    if chosen == "reference":
        return reference.kernel_merge_backward(gradient, A, B, coef, threshold, kernel, given.alpha, given.gamma, given.beta, gate)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = kernels(chosen).kernel_merge_backward.default(
        gradient, *given.tensors, threshold, row_stats, kernel, given.gate_name
    )
    return found


def fake_statistics(A: Tensor, dtype: torch.dtype, kernel: str) -> tuple[Tensor, Tensor]:
    """Threshold and row statistics as every kernel gives them."""
    return A.new_empty((), dtype=dtype), A.new_empty((2, A.shape[1]) if kernel == "mixk" else (0,), dtype=dtype)


def fake_gradients(A: Tensor, B: Tensor, coef: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of factors and scalars as every kernel gives them."""
    shapes = (A.shape, B.shape, coef.shape, (3,))
    a, b, c, scalars = (A.new_empty(shape, dtype=dtype) for shape in shapes)
    return a, b, c, scalars


def _fake_kernel_quantile(
    A: Tensor,
    B: Tensor,
    coef: Tensor,
    alpha: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    kernel: str,
    sparsity: float,
    gate: str,
) -> Tensor:
    return A.new_empty((), dtype=accumulation_dtype(A, B, coef, alpha, gamma, beta))


def _fake_kernel_merge(
    A: Tensor,
    B: Tensor,
    coef: Tensor,
    alpha: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    base: Tensor | None,
    kernel: str,
    sparsity: float,
    gate: str,
) -> tuple[Tensor, Tensor, Tensor]:
    merged = A.new_empty((B.shape[1], A.shape[1]), dtype=A.dtype if base is None else base.dtype)
    return merged, *fake_statistics(A, accumulation_dtype(A, B, coef, alpha, gamma, beta, base), kernel)


def _fake_kernel_merge_out(*arguments: Any) -> None:
    return None


def _fake_kernel_merge_backward(
    gradient: Tensor,
    A: Tensor,
    B: Tensor,
    coef: Tensor,
    alpha: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    threshold: Tensor,
    row_stats: Tensor,
    kernel: str,
    gate: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake_gradients(A, B, coef, accumulation_dtype(A, B, coef, alpha, gamma, beta, threshold))


def as_given(
    found: tuple[Tensor, Tensor, Tensor, Tensor],
    inputs: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of A, B, coef, alpha, gamma, beta in the inputs' dtypes and shapes; None for those that are not needed."""
    *thin, scalars = found
    return tuple(
        gradient.to(one.dtype).reshape(one.shape) if wanted and one is not None else None
        for gradient, one, wanted in zip((*thin, *scalars.unbind()), inputs, needed, strict=True)
    )


def _setup_kernel_merge(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *factors, base, kernel, _, gate = inputs
    _, threshold, row_stats = output
    ctx.mark_non_differentiable(threshold, row_stats)
    ctx.save_for_backward(*factors, threshold, row_stats)
    ctx.kernel, ctx.gate = kernel, gate
    ctx.base_dtype = None if base is None else base.dtype


def _kernel_merge_backward(ctx: Any, gradient: Tensor, *of_statistics: Tensor | None) -> tuple[Tensor | None, ...]:
    *factors, threshold, row_stats = ctx.saved_tensors
    needed = ctx.needs_input_grad
    thin: tuple[Tensor | None, ...] = (None,) * 6
    if any(needed[:6]):
        found = ctx.ops.kernel_merge_backward.default(gradient, *factors, threshold, row_stats, ctx.kernel, ctx.gate)
        thin = as_given(found, tuple(factors), needed[:6])
    return *thin, gradient.to(ctx.base_dtype) if needed[6] else None, None, None, None


register("kernel_quantile", fake=_fake_kernel_quantile)
register("kernel_merge", fake=_fake_kernel_merge, backward=_kernel_merge_backward, setup_context=_setup_kernel_merge)
register("kernel_merge_out", fake=_fake_kernel_merge_out, mutates=True)
register("kernel_merge_backward", fake=_fake_kernel_merge_backward)

"""One task's vectors from shared bases."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from taskloom.ops._backends import kernel
from taskloom.ops._register import register
from taskloom.ops.lowrank._positions import check_positions
from taskloom.reference import lowrank as reference
from taskloom.reference.arithmetic import accumulation_dtype


def rmm_reconstruct(mean: Tensor, basis: Tensor, coefficients: Tensor) -> Tensor:
    """Give one task's vectors back: ``mean + coefficients basis`` at each position.

    Parameters
    ----------
    mean, basis
        Shapes ``[P, r]`` and ``[P, p, r]``, as :func:`rmm_fit` gives them; float32, bfloat16, float16 or float64.
    coefficients
        One task's, shape ``[P, p]``, of any of these dtypes.

    Returns
    -------
    Tensor
        Shape ``[P, r]`` in mean's dtype: summed in float32 (float64 where a tensor is float64), directions in order, and rounded once.

    Raises
    ------
    TypeError
        If a tensor has another dtype.
    ValueError
        If the shapes do not fit, or devices differ.

    Notes
    -----
    Source: reversible model merging, arXiv 2510.14163. Differentiable any number of times with respect to all three.
    """
    op = "rmm_reconstruct"
    check_positions(op, mean, basis, coefficients, ("mean", "basis", "coefficients"))
    if coefficients.dim() != 2:
        raise ValueError(f"{op}: coefficients: expected one task's, shape {tuple(basis.shape[:2])}, got {tuple(coefficients.shape)}")
    run = kernel(op, mean, basis, coefficients)
    vectors: Tensor = (reference.rmm_reconstruct if run is None else run)(mean, basis, coefficients)
    return vectors


def _fake_rmm_reconstruct(mean: Tensor, basis: Tensor, coefficients: Tensor) -> Tensor:
    return mean.new_empty(mean.shape)


def _setup_rmm_reconstruct(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    _, basis, coefficients = inputs
    ctx.save_for_backward(basis, coefficients)
    ctx.dtype = accumulation_dtype(*inputs)


def _rmm_reconstruct_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    basis, coefficients = ctx.saved_tensors
    for_mean, for_basis, for_coefficients = ctx.needs_input_grad
    wide = gradient.to(ctx.dtype)
    return (
        gradient if for_mean else None,
        (coefficients.to(ctx.dtype)[:, :, None] * wide[:, None]).to(basis.dtype) if for_basis else None,
        (basis.to(ctx.dtype) @ wide[:, :, None])[:, :, 0].to(coefficients.dtype) if for_coefficients else None,
    )


register("rmm_reconstruct", fake=_fake_rmm_reconstruct, backward=_rmm_reconstruct_backward, setup_context=_setup_rmm_reconstruct)

"""Batch normalisation of stacked experts, each feature of each by its own statistics, with an activation behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from taskloom.ops._backends import kernel
from taskloom.ops._checks import check_floating, check_shape, plain_number
from taskloom.ops._register import register
from taskloom.reference import gating as reference
from taskloom.reference.arithmetic import accumulation_dtype

ACTIVATIONS = ("none", "relu", "silu")


def _check(op: str, z: Tensor, activation: str | None, vectors: dict[str, Tensor | None]) -> str:
    """Check what both directions take; the activation as the ops take it."""
    check_floating(op, "z", z)
    if z.dim() != 3:
        raise ValueError(f"{op}: z: expected shape [B, E, D], got {tuple(z.shape)}")
    for name, one in vectors.items():
        if one is not None:
            check_floating(op, name, one)
            check_shape(op, name, one, z.shape[1:], "z's experts and features")
    name = "none" if activation is None else activation
    if name not in ACTIVATIONS:
        raise ValueError(f"{op}: activation: expected 'silu', 'relu' or None, got {activation!r}")
    return name


def _check_batch(op: str, z: Tensor) -> None:
    if z.shape[0] < 2:
        raise ValueError(f"{op}: z: expected at least two rows for a batch's statistics, got {tuple(z.shape)}")


def _keep(running: Tensor, found: Tensor, momentum: float) -> None:
    running.lerp_(found.to(running.dtype), momentum)


def batch_norm_silu(
    z: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = "silu",
) -> Tensor:
    """Normalise each feature of each expert over the batch and apply SiLU: ``act((z - mean) / sqrt(var + eps) * weight + bias)``.

    Parameters
    ----------
    z
        ``[B, E, D]``, the outputs of E stacked experts; float32, bfloat16, float16 or float64.
    weight, bias
        ``[E, D]`` of any of these dtypes; default None: one and zero.
    running_mean, running_var
        ``[E, D]``: in training they are moved by ``momentum`` towards the batch's mean and unbiased variance, in place; else they are the
        statistics. Default None, for training only.
    training
        Whether the statistics are the batch's own.
    momentum
        The batch's share in the running statistics. Default 0.1.
    eps
        Added to the variance. Default 1e-5.
    activation
        ``"silu"`` (default), ``"relu"`` or None.

    Returns
    -------
    Tensor
        ``[B, E, D]`` in z's dtype, contiguous. Statistics and arithmetic are float32 (float64 where a tensor is float64); the result is
        rounded once.

    Raises
    ------
    TypeError
        If a tensor has another dtype.
    ValueError
        If shapes do not fit, the activation is unknown, only one of the running statistics is given or none outside of training, or a batch
        in training has fewer than two rows.

    Notes
    -----
    Source: the experts of HoME, arXiv 2408.05430; batch normalisation, Ioffe and Szegedy, arXiv 1502.03167. It is
    ``torch.nn.BatchNorm1d(E * D)`` on ``[B, E * D]``, or one BatchNorm1d for each expert, with the activation in the same pass; it is not
    one BatchNorm1d over ``[B * E, D]``.

    Without training a row's result does not depend on the batch it is in. In training a NaN or an infinity in a feature makes all rows of
    that feature NaN. Once differentiable with respect to z, weight and bias; twice with ``taskloom.backend("reference")``. Only z and the
    statistics are kept for backward. On the CPU the bits do not depend on the number of threads or the CPU level.
    """
    op = "batch_norm_silu"
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    name = _check(op, z, activation, vectors)
    momentum, eps = plain_number(op, "momentum", momentum), plain_number(op, "eps", eps)
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{op}: running_mean, running_var: expected both or none")
    if training:
        _check_batch(op, z)
    elif running_mean is None:
        raise ValueError(f"{op}: running_mean, running_var: expected both where training is False, got None")
    run = kernel(op, z, *(one for one in vectors.values() if one is not None)) or reference.batch_norm_silu
    if not training:
        return run(z, weight, bias, running_mean, running_var, eps, name)[0]
    y, mean, var = run(z, weight, bias, None, None, eps, name)
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            _keep(running_mean, mean.detach(), momentum)
            _keep(running_var, var.detach() * (z.shape[0] / (z.shape[0] - 1)), momentum)
    return y


def batch_norm_silu_backward(
    gradient: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    *,
    running: bool = False,
    eps: float = 1e-5,
    activation: str | None = "silu",
    for_z: bool = True,
    for_weight: bool = True,
    for_bias: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`batch_norm_silu`'s z, weight and bias.

    Parameters
    ----------
    gradient, z
        ``[B, E, D]``.
    weight, bias
        As in forward.
    mean, var
        The statistics of forward, ``[E, D]`` in the dtype of the arithmetic, the variance biased.
    running
        Whether the statistics are constants. Default False: they depend on z.
    eps, activation
        As in forward.
    for_z, for_weight, for_bias
        Which gradients are wanted. Default: all.

    Returns
    -------
    dz, dweight, dbias : Tensor
        In the shapes and dtypes of z, weight and bias; empty where not wanted or not there. Rows are added up in a fixed order.

    Notes
    -----
    Source: this library. Not differentiable.
    """
    op = "batch_norm_silu_backward"
    name = _check(op, z, activation, {"weight": weight, "bias": bias, "mean": mean, "var": var})
    check_shape(op, "gradient", gradient, z.shape, "z")
    vectors = [one for one in (weight, bias) if one is not None]
    run = kernel(op, gradient, z, mean, var, *vectors) or reference.batch_norm_silu_backward
    found: tuple[Tensor, Tensor, Tensor] = run(gradient, z, weight, bias, mean, var, running, eps, name, for_z, for_weight, for_bias)
    return found


def _fake_norm(
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(z, weight, bias, running_mean, running_var)
    return z.new_empty(z.shape), z.new_empty(z.shape[1:], dtype=dtype), z.new_empty(z.shape[1:], dtype=dtype)


def _fake_backward(
    gradient: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    running: bool,
    eps: float,
    activation: str,
    for_z: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        z.new_empty(z.shape if for_z else (0,)),
        z.new_empty(0) if weight is None else weight.new_empty(weight.shape if for_weight else (0,)),
        z.new_empty(0) if bias is None else bias.new_empty(bias.shape if for_bias else (0,)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    z, weight, bias, running_mean, _, eps, activation = inputs
    ctx.save_for_backward(z, weight, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.settings = (running_mean is not None, eps, activation)


def _backward(ctx: Any, gradient: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
    wanted = tuple(bool(one) for one in ctx.needs_input_grad[:3])
    found = ctx.ops.batch_norm_silu_backward.default(gradient, *ctx.saved_tensors, *ctx.settings, *wanted)
    return (*(one if want else None for one, want in zip(found, wanted, strict=True)), None, None, None, None)


register("batch_norm_silu", fake=_fake_norm, backward=_backward, setup_context=_setup)
register("batch_norm_silu_backward", fake=_fake_backward)

"""Group norm and SiLU of a window of channels for each sample; the channels outside count as zeros."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from taskloom.ops._backends import kernel
from taskloom.ops._checks import check_floating, check_shape
from taskloom.ops._register import register
from taskloom.ops.routed._conv_checks import check_integer
from taskloom.ops.routed._kernel_runs import run_checked
from taskloom.ops.routed._norm_autograd import keep_norm, norm_gradients
from taskloom.ops.routed._windows import Window, check_values, window_of, window_tensors
from taskloom.reference import routed as reference
from taskloom.reference.arithmetic import accumulation_dtype

Normalised = tuple[Tensor, Tensor, Tensor]


def check_maps(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, names: tuple[str, str]) -> list[Tensor]:
    """Raise unless x is [N, C, ...] in groups, with a factor and an addend for each channel; those that are there."""
    check_floating(op, "x", x)
    if x.dim() < 2 or 0 in x.shape[1:]:
        raise ValueError(f"{op}: x: expected shape [N, C, ...] with at least one channel and one place in it, got {tuple(x.shape)}")
    check_integer(op, "groups", groups)
    if groups < 1 or x.shape[1] % groups != 0:
        raise ValueError(f"{op}: groups: expected a divisor of {x.shape[1]}, the channels of x, got {groups}")
    given = []
    for name, one in zip(names, (weight, bias), strict=True):
        if one is not None:
            check_floating(op, name, one)
            check_shape(op, name, one, (x.shape[1],), "x's channels")
            given.append(one)
    return given


def normalised_maps(
    op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, window: Window, eps: float, outside: bool
) -> Normalised:
    """y, mean and 1 / deviation of maps [N, C, S]: what :func:`window_group_norm_silu` and its users call, by the chosen backend."""
    given = [one for one in (weight, bias) if one is not None]
    run = kernel("window_group_norm_silu", x, *given, *window_tensors(window))
    arguments = (x, weight, bias, groups, *window, eps, outside)
    if run is None:
        check_values(op, len(x), x.shape[1], window)
        return reference.window_group_norm_silu(*arguments)
    found: Normalised = run_checked(op, len(x), x.shape[1], window, run, *arguments)
    return found


def as_maps(x: Tensor) -> Tensor:
    """[N, C, ...] as [N, C, S]."""
    return x if x.dim() == 3 else x.reshape(*x.shape[:2], x.shape[2:].numel())


def window_group_norm_silu(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    groups: int,
    start: Tensor | int,
    width: Tensor | int,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise groups of channels, those outside of a window as zeros, and apply SiLU: ``silu(GN(m x) weight + bias)``.

    Parameters
    ----------
    x
        ``[N, C, ...]``, such as ``[N, C, H, W]``; float32, bfloat16, float16 or float64. Only the channels of a sample's window are read.
    weight, bias
        ``[C]`` of any of these dtypes; default None: ones and zeros.
    groups
        Groups of channels, a divisor of C.
    start, width
        As in :func:`taskloom.window_layer_norm`.
    eps
        Added to the variance. Default 1e-5, as in torch's GroupNorm.

    Returns
    -------
    Tensor
        x's shape and dtype, contiguous. Mean and variance of a group are over all of its channels and places, those outside of the window
        as zeros, in float32 (float64 where a tensor is float64) and from block to block in double; a channel outside of the window gets one
        constant, ``silu(-mean / deviation * weight + bias)``, not 0.

    Raises
    ------
    TypeError
        If a tensor has another dtype.
    ValueError
        If shapes or groups do not fit or a window leaves the channels (on a GPU that is a device-side assertion, in compiled code a
        RuntimeError).

    Notes
    -----
    Source: the first norm of a masked residual block of ADM, for DTR, arXiv 2310.07138; placed before the norm as in DTR's DiT.

    Differentiable once with respect to x (0 outside of the window), weight and bias; twice with ``taskloom.backend("reference")``. No mask
    and no masked copy of x is stored. On the CPU the bits do not depend on the number of threads or the CPU level.
    """
    op = "window_group_norm_silu"
    check_maps(op, x, weight, bias, groups, ("weight", "bias"))
    window = window_of(op, len(x), x.shape[1], start, width, x)
    y = normalised_maps(op, as_maps(x), weight, bias, groups, window, eps, True)[0]
    return y if x.dim() == 3 else y.reshape(x.shape)


def window_group_norm_silu_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    groups: int,
    start: Tensor | int,
    width: Tensor | int,
    for_mean: Tensor | None = None,
    for_rstd: Tensor | None = None,
    outside: bool = True,
    for_x: bool = True,
    for_affine: bool = True,
) -> Normalised:
    """The gradients of :func:`window_group_norm_silu`.

    Parameters
    ----------
    gradient, x
        ``[N, C, S]``.
    weight, bias, groups, start, width
        As in the op.
    mean, rstd
        ``[N, groups]``, what the forward op found, float32 or float64.
    for_mean, for_rstd
        Gradients of these two themselves, in their dtype and shape; default None: zeros.
    outside
        Whether the channels outside of the window were results; else the gradient is not read there. Default True.
    for_x, for_affine
        Which gradients are wanted. Default: all.

    Returns
    -------
    dx, dweight, dbias : Tensor
        In the shapes and dtypes of x, weight and bias; empty where not wanted or not there. dx is 0 outside of the window. Samples are
        added up in order.

    Notes
    -----
    Source: this library. Not differentiable.
    """
    op = "window_group_norm_silu_backward"
    given = check_maps(op, x, weight, bias, groups, ("weight", "bias"))
    check_shape(op, "gradient", gradient, x.shape, "x")
    given += [one for one in (for_mean, for_rstd) if one is not None]
    window = window_of(op, len(x), x.shape[1], start, width, x)
    run = kernel(op, gradient, x, *given, mean, rstd, *window_tensors(window))
    arguments = (gradient, x, weight, bias, groups, *window, mean, rstd, for_mean, for_rstd, outside, for_x, for_affine)
    if run is None:
        check_values(op, len(x), x.shape[1], window)
        return reference.window_group_norm_silu_backward(*arguments)
    found: Normalised = run_checked(op, len(x), x.shape[1], window, run, *arguments)
    return found


def _fake_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    start: Tensor,
    width: int,
    widths: Tensor | None,
    eps: float,
    outside: bool,
) -> Normalised:
    dtype = accumulation_dtype(x, weight, bias)
    statistics = (x.shape[0], groups)
    return x.new_empty(x.shape), x.new_empty(statistics, dtype=dtype), x.new_empty(statistics, dtype=dtype)


def _fake_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    start: Tensor,
    width: int,
    widths: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    for_mean: Tensor | None,
    for_rstd: Tensor | None,
    outside: bool,
    for_x: bool,
    for_affine: bool,
) -> Normalised:
    def like(one: Tensor | None, wanted: bool) -> Tensor:
        return one.new_empty(one.shape) if wanted and one is not None else x.new_empty(0)

    return like(x, for_x), like(weight, for_affine), like(bias, for_affine)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Normalised) -> None:
    x, weight, bias, groups, start, width, widths, _, outside = inputs
    keep_norm(ctx, x, (weight, bias), (groups,), (start, width, widths), outside, output[1:])


def _backward(ctx: Any, gradient: Tensor | None, for_mean: Tensor | None, for_rstd: Tensor | None) -> tuple[Tensor | None, ...]:
    return norm_gradients(ctx, ctx.ops.window_group_norm_silu_backward.default, gradient, for_mean, for_rstd, 6)


register("window_group_norm_silu", fake=_fake_norm, backward=_backward, setup_context=_setup)
register("window_group_norm_silu_backward", fake=_fake_backward)

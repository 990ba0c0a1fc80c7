"""Layer norm with modulation of a window of channels for each sample; the channels outside count as zeros."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from taskloom.ops._backends import kernel
from taskloom.ops._checks import check_floating, check_shape
from taskloom.ops._register import register
from taskloom.ops.routed._kernel_runs import run_checked
from taskloom.ops.routed._norm_autograd import keep_norm, norm_gradients
from taskloom.ops.routed._windows import Window, check_values, window_of, window_tensors
from taskloom.reference import routed as reference
from taskloom.reference.arithmetic import accumulation_dtype

Normalised = tuple[Tensor, Tensor, Tensor]


def check_modulation(op: str, x: Tensor, shift: Tensor | None, scale: Tensor | None) -> list[Tensor]:
    """Raise unless shift and scale are [N, C]; those that are there."""
    given = []
    for name, one in (("shift", shift), ("scale", scale)):
        if one is not None:
            check_floating(op, name, one)
            check_shape(op, name, one, (x.shape[0], x.shape[-1]), "x's samples and channels")
            given.append(one)
    return given


def check_rows(op: str, x: Tensor) -> None:
    """Raise unless x is [N, ..., C] with channels."""
    check_floating(op, "x", x)
    if x.dim() < 2 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x: expected shape [N, ..., C] with at least one channel, got {tuple(x.shape)}")


def normalised(op: str, x: Tensor, shift: Tensor | None, scale: Tensor | None, window: Window, eps: float, outside: bool) -> Normalised:
    """y, mean and 1 / deviation of rows [N, P, C]: what :func:`window_layer_norm` and its users call, by the chosen backend."""
    given = [one for one in (shift, scale) if one is not None]
    run = kernel("window_layer_norm", x, *given, *window_tensors(window))
    if run is None:
        check_values(op, len(x), x.shape[2], window)
        return reference.window_layer_norm(x, shift, scale, *window, eps, outside)
    found: Normalised = run_checked(op, len(x), x.shape[2], window, run, x, shift, scale, *window, eps, outside)
    return found


def as_rows(x: Tensor) -> Tensor:
    """[N, ..., C] as [N, P, C]."""
    return x if x.dim() == 3 else x.reshape(x.shape[0], x.shape[1:-1].numel(), x.shape[-1])


def window_layer_norm(
    x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None, *, start: Tensor | int, width: Tensor | int, eps: float = 1e-6
) -> Tensor:
    """Normalise rows whose channels outside of a window count as zeros, and modulate them: ``LN(m x) (1 + scale) + shift``.

    Parameters
    ----------
    x
        ``[N, ..., C]``, usually ``[N, P, C]``; float32, bfloat16, float16 or float64. Only the channels of a sample's window are read.
    shift, scale
        ``[N, C]`` of any of these dtypes; default None: zeros.
    start
        First channel of each sample's window, integers ``[N]``; an integer or ``[]`` for one window of all samples.
    width
        Channels of the windows, from 0 to C: an integer, or integers ``[N]``.
    eps
        Added to the variance. Default 1e-6, as in DiT.

    Returns
    -------
    Tensor
        x's shape and dtype, contiguous. Mean and variance are over all C channels, those outside of the window as zeros, in float32
        (float64 where a tensor is float64) and in two passes; the result there is ``-mean / deviation * (1 + scale) + shift``, not 0.

    Raises
    ------
    TypeError
        If a tensor has another dtype.
    ValueError
        If shapes do not fit or a window leaves the channels (on a GPU that is a device-side assertion, in compiled code a RuntimeError).

    Notes
    -----
    Source: the first norm of DTR's masked DiT block, arXiv 2310.07138, in one pass.

    Differentiable once with respect to x (0 outside of the window), shift and scale; twice with ``taskloom.backend("reference")``. No mask
    and no masked copy of x is stored, forward or backward; backward keeps x and two numbers a row. On the CPU the bits do not depend on the
    number of threads or the CPU level.
    """
    op = "window_layer_norm"
    check_rows(op, x)
    check_modulation(op, x, shift, scale)
    window = window_of(op, len(x), x.shape[-1], start, width, x)
    y = normalised(op, as_rows(x), shift, scale, window, eps, True)[0]
    return y if x.dim() == 3 else y.reshape(x.shape)


def window_layer_norm_backward(
    gradient: Tensor,
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    start: Tensor | int,
    width: Tensor | int,
    for_mean: Tensor | None = None,
    for_rstd: Tensor | None = None,
    outside: bool = True,
    for_x: bool = True,
    for_modulation: bool = True,
) -> Normalised:
    """The gradients of :func:`window_layer_norm`.

    Parameters
    ----------
    gradient, x
        ``[N, P, C]``.
    shift, scale
        As in the op; of shift only the dtype is looked at.
    mean, rstd
        ``[N, P]``, what the forward op found, float32 or float64.
    start, width
        As in the op.
    for_mean, for_rstd
        Gradients of these two themselves, in their dtype and shape; default None: zeros.
    outside
        Whether the channels outside of the window were results; else the gradient is not read there. Default True.
    for_x, for_modulation
        Which gradients are wanted. Default: all.

    Returns
    -------
    dx, dshift, dscale : Tensor
        In the shapes and dtypes of x, shift and scale; empty where not wanted or not there. dx is 0 outside of the window. Rows are added
        up in pieces of a size that depends on the shape alone.

    Notes
    -----
    Source: this library. Not differentiable.
    """
    op = "window_layer_norm_backward"
    check_rows(op, x)
    given = check_modulation(op, x, shift, scale)
    check_shape(op, "gradient", gradient, x.shape, "x")
    given += [one for one in (for_mean, for_rstd) if one is not None]
    window = window_of(op, len(x), x.shape[2], start, width, x)
    run = kernel(op, gradient, x, *given, mean, rstd, *window_tensors(window))
    arguments = (gradient, x, shift, scale, *window, mean, rstd, for_mean, for_rstd, outside, for_x, for_modulation)
    if run is None:
        check_values(op, len(x), x.shape[2], window)
        return reference.window_layer_norm_backward(*arguments)
    found: Normalised = run_checked(op, len(x), x.shape[2], window, run, *arguments)
    return found


def _fake_norm(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    start: Tensor,
    width: int,
    widths: Tensor | None,
    eps: float,
    outside: bool,
) -> Normalised:
    dtype = accumulation_dtype(x, shift, scale)
    return x.new_empty(x.shape), x.new_empty(x.shape[:2], dtype=dtype), x.new_empty(x.shape[:2], dtype=dtype)


def _fake_backward(
    gradient: Tensor,
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    start: Tensor,
    width: int,
    widths: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    for_mean: Tensor | None,
    for_rstd: Tensor | None,
    outside: bool,
    for_x: bool,
    for_modulation: bool,
) -> Normalised:
    def like(one: Tensor | None, wanted: bool) -> Tensor:
        return one.new_empty(one.shape) if wanted and one is not None else x.new_empty(0)

    return like(x, for_x), like(shift, for_modulation), like(scale, for_modulation)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Normalised) -> None:
    x, shift, scale, start, width, widths, _, outside = inputs
    keep_norm(ctx, x, (shift, scale), (), (start, width, widths), outside, output[1:])


def _backward(ctx: Any, gradient: Tensor | None, for_mean: Tensor | None, for_rstd: Tensor | None) -> tuple[Tensor | None, ...]:
    return norm_gradients(ctx, ctx.ops.window_layer_norm_backward.default, gradient, for_mean, for_rstd, 5)


register("window_layer_norm", fake=_fake_norm, backward=_backward, setup_context=_setup)
register("window_layer_norm_backward", fake=_fake_backward)

"""Channels scaled by sample, with a bias and an activation, in a window of channels or in all."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from taskloom.ops._backends import kernel
from taskloom.ops._checks import check_floating, check_shape
from taskloom.ops._register import register
from taskloom.ops.routed._kernel_runs import run_checked
from taskloom.ops.routed._windows import OutWindow, check_values, window_of, window_tensors
from taskloom.reference import routed as reference

ACTIVATIONS = ("none", "relu", "gelu", "silu")


def _check_scaled(op: str, x: Tensor, scale: Tensor, bias: Tensor | None, activation: str | None) -> str:
    """Check all but the window; the activation as the ops take it."""
    check_floating(op, "x", x)
    if x.dim() < 2 or x.shape[1] == 0:
        raise ValueError(f"{op}: x: expected shape [N, C, ...] with at least one channel, got {tuple(x.shape)}")
    check_floating(op, "scale", scale)
    check_shape(op, "scale", scale, x.shape[:2], "x's samples and channels")
    if bias is not None:
        check_floating(op, "bias", bias)
        check_shape(op, "bias", bias, (x.shape[1],), "x's channels")
    name = "none" if activation is None else activation
    if name not in ACTIVATIONS:
        raise ValueError(f"{op}: activation: expected None, 'relu', 'gelu' or 'silu', got {activation!r}")
    return name


def _optional_window(op: str, x: Tensor, start: Tensor | int | None, width: Tensor | int | None) -> OutWindow:
    if start is None and width is None:
        return None, x.shape[1], None
    if start is None or width is None:
        raise ValueError(f"{op}: start, width: expected both or none, got only {'start' if width is None else 'width'}")
    return window_of(op, len(x), x.shape[1], start, width, x)


def channel_scale(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    start: Tensor | int | None = None,
    width: Tensor | int | None = None,
    activation: str | None = None,
) -> Tensor:
    """Scale the channels of each sample, add a bias and apply an activation: ``act(x * scale[n, c] + bias[c])``, 0 outside of a window.

    Parameters
    ----------
    x
        ``[N, C, ...]``, such as ``[N, C, H, W]``; float32, bfloat16, float16 or float64. Only the channels of a sample's window are read.
    scale
        ``[N, C]`` of any of these dtypes: a gate, or a batch norm's factor and the gate in one.
    bias
        ``[C]``; default None: zeros.
    start, width
        As in :func:`taskloom.window_layer_norm`; default None: all channels.
    activation
        ``"relu"``, ``"gelu"`` (by the error function), ``"silu"`` or None, the default.

    Returns
    -------
    Tensor
        x's shape and dtype, contiguous; computed in float32 (float64 where a tensor is float64) and rounded once. Outside of the window it
        is 0, whatever the activation makes of 0.

    Raises
    ------
    TypeError
        If a tensor has another dtype.
    ValueError
        If shapes do not fit, the activation is unknown or a window leaves the channels (on a GPU that is a device-side assertion, in
        compiled code a RuntimeError).

    Notes
    -----
    Source: the channel gates of M3Net, arXiv 2503.18100, and the scaled windows of DTR, arXiv 2310.07138.

    Differentiable once with respect to x, scale and bias; twice with ``taskloom.backend("reference")``. Backward computes the activation's
    argument again and keeps only the inputs. On the CPU the bits do not depend on the number of threads or the CPU level.
    """
    op = "channel_scale"
    name = _check_scaled(op, x, scale, bias, activation)
    window = _optional_window(op, x, start, width)
    maps = x if x.dim() == 3 else x.reshape(*x.shape[:2], x.shape[2:].numel())
    beside = () if bias is None else (bias,)
    run = kernel(op, maps, scale, *beside, *window_tensors(window))
    arguments = (maps, scale, bias, *window, name)
    if run is None:
        check_values(op, len(x), x.shape[1], window)
        y = reference.channel_scale(*arguments)
    else:
        y = run_checked(op, len(x), x.shape[1], window, run, *arguments)
    return y if x.dim() == 3 else y.reshape(x.shape)


def channel_scale_backward(
    gradient: Tensor,
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    start: Tensor | int | None = None,
    width: Tensor | int | None = None,
    activation: str | None = None,
    for_x: bool = True,
    for_scale: bool = True,
    for_bias: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`channel_scale`.

    Parameters
    ----------
    gradient, x
        ``[N, C, S]``.
    scale, bias, start, width, activation
        As in the op.
    for_x, for_scale, for_bias
        Which gradients are wanted. Default: all.

    Returns
    -------
    dx, dscale, dbias : Tensor
        In the shapes and dtypes of x, scale and bias; empty where not wanted or not there. All are 0 outside of the window. Samples are
        added up in order.

    Notes
    -----
    Source: this library. Not differentiable.
    """
    op = "channel_scale_backward"
    name = _check_scaled(op, x, scale, bias, activation)
    check_shape(op, "gradient", gradient, x.shape, "x")
    window = _optional_window(op, x, start, width)
    beside = () if bias is None else (bias,)
    run = kernel(op, gradient, x, scale, *beside, *window_tensors(window))
    arguments = (gradient, x, scale, bias, *window, name, for_x, for_scale, for_bias)
    if run is None:
        check_values(op, len(x), x.shape[1], window)
        return reference.channel_scale_backward(*arguments)
    found: tuple[Tensor, Tensor, Tensor] = run_checked(op, len(x), x.shape[1], window, run, *arguments)
    return found


def _fake_scale(
    x: Tensor, scale: Tensor, bias: Tensor | None, start: Tensor | None, width: int, widths: Tensor | None, activation: str
) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(
    gradient: Tensor,
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    start: Tensor | None,
    width: int,
    widths: Tensor | None,
    activation: str,
    for_x: bool,
    for_scale: bool,
    for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if for_x else (0,)),
        scale.new_empty(scale.shape if for_scale else (0,)),
        bias.new_empty(bias.shape) if for_bias and bias is not None else x.new_empty(0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, bias, start, width, widths, activation = inputs
    ctx.save_for_backward(x, scale, bias, start, widths)
    ctx.width, ctx.activation = width, activation


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, bias, start, widths = ctx.saved_tensors
    wanted = tuple(bool(one) for one in ctx.needs_input_grad[:3])
    found = ctx.ops.channel_scale_backward.default(gradient, x, scale, bias, start, ctx.width, widths, ctx.activation, *wanted)
    return (*(one if want else None for one, want in zip(found, wanted, strict=True)), None, None, None, None)


register("channel_scale", fake=_fake_scale, backward=_backward, setup_context=_setup)
register("channel_scale_backward", fake=_fake_backward)

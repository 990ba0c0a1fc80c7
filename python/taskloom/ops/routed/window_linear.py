"""A linear map that sees a window of each sample's channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from taskloom.ops._backends import describe_path, kernel
from taskloom.ops._checks import cast_layer_for_autocast, check_dtype, check_floating, check_shape
from taskloom.ops._register import implement_for_kernels, implement_on_cpu, register
from taskloom.ops.routed import _linear_products
from taskloom.ops.routed._products import product_dtype
from taskloom.ops.routed._windows import OutWindow, Window, check_values, grouped, out_window_of, window_keys, window_of, window_tensors
from taskloom.reference import routed as reference


def check_weight(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, channel_dim: int, dims: int) -> None:
    """Raise unless a layer's tensors have the dtype of x and fit its channels."""
    check_floating(op, "x", x)
    check_dtype(op, "weight", weight, x.dtype)
    if weight.dim() != dims or weight.shape[1] != x.shape[channel_dim]:
        kernel_size = ", kh, kw" if dims == 4 else ""
        raise ValueError(
            f"{op}: weight: expected shape (out, {x.shape[channel_dim]}{kernel_size}) for x {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None:
        check_dtype(op, "bias", bias, x.dtype)
        check_shape(op, "bias", bias, (weight.shape[0],), "weight says")


def _check_x(op: str, x: Tensor) -> None:
    check_floating(op, "x", x)
    if x.dim() < 2:
        raise ValueError(f"{op}: x: expected shape (N, ..., channels), got {tuple(x.shape)}")


def _rows(x: Tensor) -> Tensor:
    """X as [N, P, C]."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


def _check_values(op: str, x: Tensor, weight: Tensor, window: Window, out_window: OutWindow) -> None:
    check_values(op, len(x), x.shape[-1], window)
    check_values(op, len(x), weight.shape[0], out_window, ("out_start", "out_width"))


def window_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    start: Tensor | int,
    width: Tensor | int,
    out_start: Tensor | int | None = None,
    out_width: Tensor | int | None = None,
) -> Tensor:
    """Apply a linear map to a window of each sample's channels: ``x[n, ..., s:s+w] weight[:, s:s+w]^T + bias``.

    Parameters
    ----------
    x
        ``[N, ..., C]``; float32, bfloat16, float16 or float64. Under autocast the tensors are cast as for torch's own layer.
    weight, bias
        ``[O, C]`` and ``[O]`` in x's dtype; bias may be None, the default.
    start
        First channel s of each sample's window, integers ``[N]``; an integer or ``[]`` for one window of all samples.
    width
        Channels w of the windows, from 0 to C: an integer, or integers ``[N]``.
    out_start, out_width
        The same of windows of outputs: what is outside is 0 and not computed. Default None: every output.

    Returns
    -------
    Tensor
        ``[N, ..., O]`` in x's dtype: what ``linear(mask * x, weight, bias)`` gives. What x holds outside the windows plays no part, NaN
        neither.

    Raises
    ------
    TypeError
        If a tensor has another dtype.
    ValueError
        If shapes do not fit, or a window leaves the channels (on a GPU that is a device-side assertion, as in torch's own indexing).

    Notes
    -----
    Source: the masks of denoising task routing, Park et al., ICLR 2024, arXiv 2310.07138, with the work of masked channels left out.

    Neither a mask nor a masked copy nor a slice of the weight is stored. Once differentiable with respect to x, weight and bias; twice with
    ``taskloom.backend("reference")``. x's gradient is 0 outside the windows, and weight's exactly 0 in columns that no window has; it is
    summed without atomics, in an order that depends on the windows alone. On a CPU samples of one window share torch's products (whose
    bits may depend on the number of threads); where products of few rows would take longer than one of all rows, that one is taken, on rows
    masked 4 MB at a time: ``taskloom.explain("window_linear", x, weight, start=start, width=width)`` says so. Products of 16-bit tensors
    are summed in float32 and rounded once. On a GPU one Triton kernel reads each sample's window.
    """
    op = "window_linear"
    _check_x(op, x)
    x, weight, bias = cast_layer_for_autocast(x, weight, bias)
    check_weight(op, x, weight, bias, -1, 2)
    window = window_of(op, len(x), x.shape[-1], start, width, x)
    out_window = out_window_of(op, len(x), weight.shape[0], out_start, out_width, x)
    beside = [] if bias is None else [bias]
    run = kernel(op, x, weight, *beside, *window_tensors(window, out_window))
    rows = _rows(x)
    if run is None:
        _check_values(op, x, weight, window, out_window)
        y = reference.window_linear(rows, weight, bias, *window, *out_window)
    else:
        try:
            y = run(rows, weight, bias, *window, *out_window)
        except RuntimeError:
            if not is_compiling():
                _check_values(op, x, weight, window, out_window)
            raise
    return y.view(*x.shape[:-1], weight.shape[0])


def window_linear_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    start: Tensor,
    width: int,
    widths: Tensor | None = None,
    out_start: Tensor | None = None,
    out_width: int = 0,
    out_widths: Tensor | None = None,
    needed: Sequence[bool] = (True, True, True),
) -> list[Tensor]:
    """The gradients of :func:`window_linear`'s x, weight and bias.

    With g the output's gradient: ``dx[n, :, s:s+w] = g[n] weight[:, s:s+w]`` and 0 outside, ``dweight[:, s:s+w] += g[n]^T x[n, :, s:s+w]``,
    ``dbias = sum g``.

    Parameters
    ----------
    gradient, x
        ``[N, P, O]`` and ``[N, P, C]``.
    weight
        ``[O, C]``.
    start, width, widths
        Integers ``[N]`` or ``[]``; the largest width; integers ``[N]`` or ``[]`` where widths differ. The same of outputs, ``out_start``
        being None for all of them.
    needed
        Whether each of the three is wanted. Default: all.

    Returns
    -------
    list of Tensor
        Those that are wanted, each in the dtype and shape of what it is the gradient of.

    Notes
    -----
    Source: this library. Not differentiable.
    """
    op = "window_linear_backward"
    windows = (start, width, widths, out_start, out_width, out_widths)
    run = kernel(op, gradient, x, weight, *window_tensors((start, width, widths), (out_start, out_width, out_widths)))
    if run is None:
        return reference.window_linear_backward(gradient, x, weight, *windows, needed)
    found: list[Tensor] = run(gradient, x, weight, *windows, list(needed))
    return found


def describe_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    start: Tensor | int,
    width: Tensor | int,
    out_start: Tensor | int | None = None,
    out_width: Tensor | int | None = None,
) -> str:
    """What the CPU would do, in a sentence."""
    op = "window_linear"
    window: Window = window_of(op, len(x), x.shape[-1], start, width, x)
    out_window = out_window_of(op, len(x), weight.shape[0], out_start, out_width, x)
    keys = window_keys(op, len(x), x.shape[-1], window, weight.shape[0], out_window)
    rows, count = _rows(x), len(grouped(keys, weight.shape[0]))
    windows = f"{count} window{'s' if count != 1 else ''} among {len(x)} samples of {rows.shape[1]} rows"
    if _linear_products.is_dense(keys, rows, out_window[0]):
        own, dense = _linear_products.window_costs(keys, rows.shape[1], rows.shape[2])
        return f"dense product of masked rows: {windows}; products of windows would cost {own / max(dense, 1):.2f} of it"
    return f"products of windows: {windows}"


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *windows: Any) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], weight.shape[0]))


def fake_backward(gradient: Tensor, x: Tensor, weight: Tensor, *arguments: Any) -> list[Tensor]:
    """The gradients of x, weight and bias that are needed: the last argument says which."""
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return [x.new_empty(shape) for shape, wanted in zip(shapes, arguments[-1], strict=True) if wanted]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, start, width, widths, out_start, out_width, out_widths = inputs
    ctx.save_for_backward(x, weight, start, widths, out_start, out_widths)
    ctx.widths = width, out_width


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, start, widths, out_start, out_widths = ctx.saved_tensors
    width, out_width = ctx.widths
    needed = [bool(one) for one in ctx.needs_input_grad[:3]]
    run = ctx.ops.window_linear_backward.default
    found = iter(run(gradient, x, weight, start, width, widths, out_start, out_width, out_widths, needed) if any(needed) else ())
    return (*(next(found) if wanted else None for wanted in needed), *[None] * 6)


implement_for_kernels("multiplies_own_dtype", lambda x: product_dtype(x.dtype) == x.dtype)
implement_for_kernels("window_linear_composed", _linear_products.window_linear)
implement_on_cpu("window_linear_backward", _linear_products.window_linear_backward)
register("window_linear", fake=_fake_linear, backward=_backward, setup_context=_setup)
register("window_linear_backward", fake=fake_backward)
describe_path("window_linear", describe_linear)

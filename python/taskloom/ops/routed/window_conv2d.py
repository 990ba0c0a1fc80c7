"""A convolution that sees a window of each sample's channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from taskloom.ops._backends import describe_path, kernel
from taskloom.ops._checks import cast_layer_for_autocast, check_floating
from taskloom.ops._register import implement_on_cpu, register
from taskloom.ops.routed import _conv_loops, _conv_onednn, _conv_products
from taskloom.ops.routed._conv_checks import Pair, check_kernel, pair
from taskloom.ops.routed._windows import check_values, groups, out_window_of, window_of, window_tensors
from taskloom.ops.routed.window_linear import check_weight, fake_backward
from taskloom.reference import routed as reference


def conv_geometry(
    op: str, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair
) -> tuple[list[int], list[int], list[int]]:
    """Stride, padding and dilation as pairs; raise where the kernel is larger than the padded input."""
    check_kernel(op, weight)
    strides, paddings, dilations = pair(op, "stride", stride, 1), pair(op, "padding", padding, 0), pair(op, "dilation", dilation, 1)
    for size, taps, step, beside, apart in zip(x.shape[2:], weight.shape[2:], strides, paddings, dilations, strict=True):
        if _conv_products.out_size(size, taps, step, beside, apart) < 1:
            raise ValueError(
                f"{op}: x: expected a padded input that holds the kernel {tuple(weight.shape[2:])} with dilation {tuple(dilations)}, "
                f"got {tuple(x.shape[2:])} with padding {tuple(paddings)}"
            )
    return strides, paddings, dilations


def _check_x(op: str, x: Tensor) -> None:
    check_floating(op, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{op}: x: expected shape (N, channels, H, W), got {tuple(x.shape)}")


def window_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    start: Tensor | int,
    width: Tensor | int,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    out_start: Tensor | int | None = None,
    out_width: Tensor | int | None = None,
) -> Tensor:
    """Convolve a window of each sample's channels: ``conv2d(x[n, s:s+w], weight[:, s:s+w]) + bias``.

    Parameters
    ----------
    x
        ``[N, C, H, W]``; float32, bfloat16, float16 or float64. Under autocast the tensors are cast as for torch's own layer.
    weight, bias
        ``[O, C, kh, kw]`` and ``[O]`` in x's dtype; bias may be None, the default.
    start
        First channel s of each sample's window, integers ``[N]``; an integer or ``[]`` for one window of all samples.
    width
        Channels w of the windows, from 0 to C: an integer, or integers ``[N]``.
    stride, padding, dilation
        As :func:`torch.nn.functional.conv2d` takes them, integers or pairs. Default 1, 0, 1.
    out_start, out_width
        The same of windows of output channels: what is outside is 0 and not computed. Default None: every output.

    Returns
    -------
    Tensor
        ``[N, O, H', W']``, contiguous, in x's dtype: what ``conv2d(mask * x, weight, bias)`` gives. What x holds outside the windows plays
        no part, NaN neither.

    Raises
    ------
    TypeError
        If a tensor has another dtype.
    ValueError
        If shapes do not fit, or a window leaves the channels (on a GPU that is a device-side assertion, as in torch's own indexing).

    Notes
    -----
    Source: the masks of denoising task routing, Park et al., ICLR 2024, arXiv 2310.07138, with the work of masked channels left out.

    Once differentiable with respect to x, weight and bias; twice with ``taskloom.backend("reference")``. x's gradient is 0 outside the
    windows, and weight's exactly 0 in columns that no window has; it is summed without atomics, in an order that depends on the windows
    alone. On a CPU bfloat16, where the processor multiplies it, and float32 in runs of four samples or more of one window, go to oneDNN's
    convolution of each run, on views. Else, with AVX-512, a contiguous x, a kernel larger than 1 and 16 outputs or more, the weights of 64
    outputs at a time are packed for loops of our own, and x's gradient is made in the same way where the stride is 1. Elsewhere each
    sample's window is padded, its columns (im2col) are made 4 MB at a time, and multiplied with a view of the contiguous weight; with a
    kernel of 1 and stride 1 the input itself is multiplied. Where torch's convolution of all channels is faster it is taken, on samples
    masked 4 MB, or one, at a time: ``taskloom.explain("window_conv2d", x, weight, start=start, width=width)`` says so. Products of 16-bit
    tensors are summed in float32 and rounded once (a weight's gradient in bfloat16 once more where several windows share an entry).
    On a GPU one Triton kernel reads each sample's window, without columns.
    """
    op = "window_conv2d"
    _check_x(op, x)
    x, weight, bias = cast_layer_for_autocast(x, weight, bias)
    check_weight(op, x, weight, bias, 1, 4)
    geometry = conv_geometry(op, x, weight, stride, padding, dilation)
    window = window_of(op, len(x), x.shape[1], start, width, x)
    out_window = out_window_of(op, len(x), weight.shape[0], out_start, out_width, x)
    beside = [] if bias is None else [bias]
    run = kernel(op, x, weight, *beside, *window_tensors(window, out_window))
    if run is None:
        check_values(op, len(x), x.shape[1], window)
        check_values(op, len(x), weight.shape[0], out_window, ("out_start", "out_width"))
        return reference.window_conv2d(x, weight, bias, *window, *out_window, *geometry)
    y: Tensor = run(x, weight, bias, *window, *out_window, *geometry)
    return y


def window_conv2d_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    start: Tensor,
    width: int,
    widths: Tensor | None = None,
    out_start: Tensor | None = None,
    out_width: int = 0,
    out_widths: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    needed: Sequence[bool] = (True, True, True),
) -> list[Tensor]:
    """The gradients of :func:`window_conv2d`'s x, weight and bias.

    Parameters
    ----------
    gradient, x
        ``[N, O, H', W']`` and ``[N, C, H, W]``.
    weight
        ``[O, C, kh, kw]``.
    start, width, widths
        Integers ``[N]`` or ``[]``; the largest width; integers ``[N]`` or ``[]`` where widths differ. The same of outputs, ``out_start``
        being None for all of them.
    stride, padding, dilation
        Pairs.
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
    op = "window_conv2d_backward"
    windows = (start, width, widths, out_start, out_width, out_widths)
    geometry = (list(stride), list(padding), list(dilation))
    run = kernel(op, gradient, x, weight, *window_tensors((start, width, widths), (out_start, out_width, out_widths)))
    if run is None:
        return reference.window_conv2d_backward(gradient, x, weight, *windows, *geometry, needed)
    found: list[Tensor] = run(gradient, x, weight, *windows, *geometry, list(needed))
    return found


def describe_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    start: Tensor | int,
    width: Tensor | int,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    out_start: Tensor | int | None = None,
    out_width: Tensor | int | None = None,
) -> str:
    """What the CPU would do, in a sentence."""
    op = "window_conv2d"
    window = window_of(op, len(x), x.shape[1], start, width, x)
    out_window = out_window_of(op, len(x), weight.shape[0], out_start, out_width, x)
    planned = groups(op, len(x), x.shape[1], window, weight.shape[0], out_window)
    geometry = _conv_products.geometry_of(x, weight, *conv_geometry(op, x, weight, stride, padding, dilation))
    share = f"{_conv_products.share_seen(planned, x):.0%} of the channels are seen"
    way = _conv_products.choose_way(planned, x, len(weight), out_window[0], geometry)
    by_onednn = _conv_onednn.is_faster(planned, x, geometry)
    if way == "onednn":
        return f"oneDNN's convolutions of windows: {share}"
    if way == "dense" and by_onednn:
        own, dense = _conv_onednn.window_costs(planned, x, len(weight), geometry, backward=False)
        return f"torch's convolution of masked samples: {share}; convolutions of windows would cost {own / dense:.2f} of it"
    if way == "dense":
        least = _conv_products.dense_from(_conv_loops.are_faster(x, len(weight), geometry))
        return f"torch's convolution of masked samples: {share}, from {least:.0%} on"
    return f"{'loops over' if way == 'loops' else 'products of'} windows: {share}"


def _fake_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor, width: int, widths: Tensor | None, out_start: Tensor | None,
    out_width: int, out_widths: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return x.new_empty((x.shape[0], weight.shape[0], *(_conv_products.out_size(*one) for one in sizes)))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, start, width, widths, out_start, out_width, out_widths, *geometry = inputs
    ctx.save_for_backward(x, weight, start, widths, out_start, out_widths)
    ctx.numbers = width, out_width, geometry


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, start, widths, out_start, out_widths = ctx.saved_tensors
    width, out_width, geometry = ctx.numbers
    needed = [bool(one) for one in ctx.needs_input_grad[:3]]
    run = ctx.ops.window_conv2d_backward.default
    windows = (start, width, widths, out_start, out_width, out_widths)
    found = iter(run(gradient, x, weight, *windows, *geometry, needed) if any(needed) else ())
    return (*(next(found) if wanted else None for wanted in needed), *[None] * 9)


implement_on_cpu("window_conv2d", _conv_products.window_conv2d)
implement_on_cpu("window_conv2d_backward", _conv_products.window_conv2d_backward)
register("window_conv2d", fake=_fake_conv2d, backward=_backward, setup_context=_setup)
register("window_conv2d_backward", fake=fake_backward)
describe_path("window_conv2d", describe_conv2d)

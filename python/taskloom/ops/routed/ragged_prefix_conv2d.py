"""A convolution of a batch whose samples run at different widths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from taskloom.ops._backends import active_transform, kernel
from taskloom.ops._register import implement_on_cpu, register
from taskloom.ops.routed import _ragged_products
from taskloom.ops.routed._conv_checks import Pair, check_integer, pair
from taskloom.ops.routed._prefix_checks import check_inputs, check_weights, output_size
from taskloom.ops.routed._windows import INTEGERS
from taskloom.ops.routed.prefix_conv2d import check_image, fake_image
from taskloom.ops.routed.prefix_linear import fake_gradients, spread_found
from taskloom.reference import routed as reference


def _numbers(op: str, name: str, widths: object, most: int) -> list[int]:
    """The numbers of a sequence, in their range: a larger one might not fit a tensor."""
    if not isinstance(widths, Iterable) or isinstance(widths, str):
        raise TypeError(f"{op}: {name}: expected a tensor or a sequence of integers, got {type(widths).__name__}")
    numbers = list(widths)
    for one in numbers:
        check_integer(op, name, one)
        if not 1 <= one <= most:
            raise ValueError(f"{op}: {name}: expected values from 1 to {most}, got {one}")
    return numbers


def _widths(op: str, name: str, widths: Tensor | Sequence[int], most: int, x: Tensor) -> Tensor:
    """The number of channels of each sample, on x's device; values on a CPU are looked at."""
    if not isinstance(widths, Tensor):
        widths = torch.tensor(_numbers(op, name, widths, most), dtype=torch.int64, device=x.device)
    if widths.dtype not in INTEGERS:
        raise TypeError(f"{op}: {name}: expected integers, got {widths.dtype}")
    if widths.shape != x.shape[:1]:
        raise ValueError(f"{op}: {name}: expected shape ({x.shape[0]},), one for each sample, got {tuple(widths.shape)}")
    if widths.is_cpu and not torch.compiler.is_compiling() and active_transform() is None and widths.numel():
        lowest, highest = (int(one) for one in widths.aminmax())
        if lowest < 1 or highest > most:
            raise ValueError(f"{op}: {name}: expected values from 1 to {most}, got {lowest if lowest < 1 else highest}")
    return widths.long()


def ragged_prefix_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    in_channels: Tensor | Sequence[int],
    out_channels: Tensor | Sequence[int],
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    zero_tail: bool = True,
) -> Tensor:
    """Convolve every sample with prefixes of its own: sample n with ``weight[:out_channels[n], :in_channels[n]]``.

    Parameters
    ----------
    x
        ``[N, C', H, W]``, C' at most the layer's C; float32, bfloat16, float16 or float64. What lies past a sample's ``in_channels`` is
        never read.
    weight, bias
        The whole layer's, ``[O, C, kh, kw]`` and ``[O]`` (default None), in x's dtype.
    in_channels, out_channels
        Integers ``[N]``: 1 to C', and 1 to O.
    stride, padding, dilation
        As :func:`torch.nn.functional.conv2d` takes them, integers or pairs. Defaults 1, 0, 1.
    zero_tail
        Whether channels of the result past a sample's ``out_channels`` are zero. Without, they hold whatever the memory held: right for a
        next layer that does not read them. Default True.

    Returns
    -------
    Tensor
        ``[N, O, H', W']`` in x's dtype, laid out as x is. A sample's result is that of :func:`prefix_conv2d` at its widths, whatever the
        other samples are.

    Raises
    ------
    TypeError
        If a tensor has another dtype.
    ValueError
        If shapes do not fit, or a width is not in its range (on a GPU the latter is a device-side assertion).

    Notes
    -----
    Source: this library; for batches of controllable multi-task networks, arXiv 2308.11744, that serve several users at once.

    Once differentiable: gradients past a sample's ``out_channels`` are not read, x's are zero past its ``in_channels``, and the weight's
    are summed over the samples without atomics. Twice differentiable with ``taskloom.backend("reference")``.
    """
    op = "ragged_prefix_conv2d"
    check_weights(op, x, weight, bias, 4)
    check_image(op, x)
    check_inputs(op, x.shape[1], weight.shape[1])
    inputs = _widths(op, "in_channels", in_channels, x.shape[1], x)
    outputs = _widths(op, "out_channels", out_channels, weight.shape[0], x)
    steps = (pair(op, "stride", stride, 1), pair(op, "padding", padding, 0), pair(op, "dilation", dilation, 1))
    output_size(op, x, weight, *steps)
    beside = () if bias is None else (bias,)
    run = kernel(op, x, weight, inputs, outputs, *beside)
    if run is None:
        return reference.ragged_prefix_conv2d(x, weight, bias, inputs, outputs, *steps, zero_tail)
    y: Tensor = run(x, weight, bias, inputs, outputs, *steps, zero_tail)
    return y


def ragged_prefix_conv2d_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    in_channels: Tensor,
    out_channels: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    needed: Sequence[bool] = (True, True, False),
) -> list[Tensor]:
    """The gradients of :func:`ragged_prefix_conv2d`'s x, weight and bias.

    Parameters
    ----------
    gradient, x
        ``[N, O, H', W']`` and ``[N, C', H, W]``; neither is read past its sample's channels.
    weight, bias, in_channels, out_channels
        As in forward; bias gives shape and dtype only.
    stride, padding, dilation
        As in forward, in pairs.
    needed
        Whether each of the three is wanted. Default: those of x and weight.

    Returns
    -------
    list of Tensor
        Those that are wanted, contiguous, in the shape and dtype of what they are the gradients of: zero where nothing was used.

    Notes
    -----
    Source: this library. Not differentiable.
    """
    op = "ragged_prefix_conv2d_backward"
    run = kernel(op, gradient, x, weight, in_channels, out_channels)
    call = reference.ragged_prefix_conv2d_backward if run is None else run
    found: list[Tensor] = call(gradient, x, weight, bias, in_channels, out_channels, stride, padding, dilation, list(needed))
    return found


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_channels: Tensor,
    out_channels: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    zero_tail: bool,
) -> Tensor:
    return fake_image(x, weight, weight.shape[0], (stride, padding, dilation))


def _fake_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_channels: Tensor,
    out_channels: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    needed: Sequence[bool],
) -> list[Tensor]:
    return fake_gradients(x, weight, bias, needed)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.steps = inputs[5:8]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, inputs, outputs = ctx.saved_tensors
    needed = [bool(one) for one in ctx.needs_input_grad[:3]]
    run = ctx.ops.ragged_prefix_conv2d_backward.default
    found = run(gradient, x, weight, bias, inputs, outputs, *ctx.steps, needed) if any(needed) else ()
    return spread_found(needed, found, 6)


implement_on_cpu("ragged_prefix_conv2d", _ragged_products.ragged_prefix_conv2d)
implement_on_cpu("ragged_prefix_conv2d_backward", _ragged_products.ragged_prefix_conv2d_backward)
register("ragged_prefix_conv2d", fake=_fake, backward=_backward, setup_context=_setup)
register("ragged_prefix_conv2d_backward", fake=_fake_backward)

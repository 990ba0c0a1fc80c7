"""A convolution that runs on a prefix of its input and output channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from taskloom.ops._backends import kernel
from taskloom.ops._register import implement_for_kernels, implement_on_cpu, register
from taskloom.ops.routed import _prefix_products
from taskloom.ops.routed._conv_checks import Pair, check_integer, pair
from taskloom.ops.routed._prefix_checks import check_inputs, check_weights, check_width, empty_result, output_size
from taskloom.ops.routed._products import onednn_dtypes
from taskloom.ops.routed.prefix_linear import fake_gradients, spread_found
from taskloom.reference import routed as reference


def check_image(op: str, x: Tensor) -> None:
    """Raise unless x is [N, C, H, W]."""
    if x.dim() != 4:
        raise ValueError(f"{op}: x: expected shape (N, C, H, W), got {tuple(x.shape)}")


def _grouped_outputs(op: str, x: Tensor, weight: Tensor, out_channels: int | None, groups: int) -> int:
    """The active outputs of a layer of several groups: those of the groups that x has."""
    outputs, inputs = weight.shape[0], weight.shape[1]
    if groups < 1 or outputs % groups:
        raise ValueError(f"{op}: groups: expected a divisor of weight's {outputs} outputs, got {groups}")
    check_inputs(op, x.shape[1], inputs * groups)
    if x.shape[1] % inputs:
        raise ValueError(f"{op}: x: expected a multiple of the {inputs} channels of a group, got {x.shape[1]}")
    present = x.shape[1] // inputs
    active = present * (outputs // groups)
    if out_channels is not None and check_width(op, "out_channels", out_channels, outputs) != active:
        raise ValueError(
            f"{op}: out_channels: expected {active}, those of the {present} groups (of {groups}) that x has, got {out_channels}"
        )
    return active


def prefix_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out_channels: int | None = None,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve with the part of a layer that its first input and output channels make: ``weight[:out, :in]`` and ``bias[:out]``.

    Parameters
    ----------
    x
        ``[N, in, H, W]``, where ``in`` is how many of the layer's channels are active; float32, bfloat16, float16 or float64, in any
        strides. A view of a wider tensor is read where it is.
    weight, bias
        The whole layer's, ``[O, C / groups, kh, kw]`` and ``[O]`` (default None), in x's dtype. Only the prefix is read, and
        copied nowhere but in oneDNN's convolution on a CPU (docs/routed.md).
    out_channels
        How many output channels are active, 1 to O. Default None: all, or with several groups those of the groups that x has.
    stride, padding, dilation
        As :func:`torch.nn.functional.conv2d` takes them, integers or pairs. Defaults 1, 0, 1.
    groups
        The groups of the whole layer. Their sizes stay, so that x has the first ``in / weight.shape[1]`` of them; a depthwise layer has
        as many outputs as x has channels. Default 1.

    Returns
    -------
    Tensor
        ``[N, out_channels, H', W']`` in x's dtype, channels last where x's channels lie so, else contiguous. It does not depend on entries
        of weight and bias outside the prefix.

    Raises
    ------
    TypeError
        If a tensor has another dtype, or ``out_channels`` is not an integer.
    ValueError
        If shapes do not fit, or a width is not in its range; if a layer of several groups would cut one of them.

    Notes
    -----
    Source: slimmable layers, Yu et al., ICLR 2019, arXiv 1812.08928; used by controllable multi-task networks, arXiv 2308.11744.

    Once differentiable; the gradients of weight and bias have their whole shapes and are exactly zero outside the prefix. Twice
    differentiable with ``taskloom.backend("reference")``. docs/routed.md says which of torch's products and convolutions a CPU uses.
    """
    op = "prefix_conv2d"
    check_weights(op, x, weight, bias, 4)
    check_image(op, x)
    check_integer(op, "groups", groups)
    if groups == 1:
        check_inputs(op, x.shape[1], weight.shape[1])
        outputs = check_width(op, "out_channels", out_channels, weight.shape[0])
    else:
        outputs = _grouped_outputs(op, x, weight, out_channels, groups)
    steps = (pair(op, "stride", stride, 1), pair(op, "padding", padding, 0), pair(op, "dilation", dilation, 1))
    output_size(op, x, weight, *steps)
    run = kernel(op, x, weight) if bias is None else kernel(op, x, weight, bias)
    if run is None:
        return reference.prefix_conv2d(x, weight, bias, outputs, *steps, groups)
    y: Tensor = run(x, weight, bias, outputs, *steps, groups)
    return y


def prefix_conv2d_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    needed: Sequence[bool] = (True, True, False),
) -> list[Tensor]:
    """The gradients of :func:`prefix_conv2d`'s x, weight and bias.

    Parameters
    ----------
    gradient, x
        ``[N, out, H', W']`` and ``[N, in, H, W]``; they tell the prefix.
    weight, bias
        As in forward; bias gives shape and dtype only.
    stride, padding, dilation, groups
        As in forward, in pairs.
    needed
        Whether each of the three is wanted. Default: those of x and weight.

    Returns
    -------
    list of Tensor
        Those that are wanted, contiguous, in the shape and dtype of what they are the gradients of: zero outside the prefix.

    Notes
    -----
    Source: this library. Not differentiable.
    """
    op = "prefix_conv2d_backward"
    run = kernel(op, gradient, x, weight)
    if run is None:
        return reference.prefix_conv2d_backward(gradient, x, weight, bias, stride, padding, dilation, groups, needed)
    found: list[Tensor] = run(gradient, x, weight, bias, stride, padding, dilation, groups, list(needed))
    return found


def fake_image(x: Tensor, weight: Tensor, outputs: int, steps: tuple[Sequence[int], Sequence[int], Sequence[int]]) -> Tensor:
    """An empty result, laid out as x is."""
    return empty_result(x, (x.shape[0], outputs, *output_size("prefix_conv2d", x, weight, *steps)))


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return fake_image(x, weight, out_channels, (stride, padding, dilation))


def _fake_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needed: Sequence[bool],
) -> list[Tensor]:
    return fake_gradients(x, weight, bias, needed)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.steps = inputs[4:]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    needed = [bool(one) for one in ctx.needs_input_grad[:3]]
    found = ctx.ops.prefix_conv2d_backward.default(gradient, x, weight, bias, *ctx.steps, needed) if any(needed) else ()
    return spread_found(needed, found, 5)


implement_for_kernels("onednn_convolves", lambda x: x.dtype in onednn_dtypes())
implement_for_kernels("prefix_conv2d_composed", _prefix_products.prefix_conv2d)
implement_on_cpu("prefix_conv2d_backward", _prefix_products.prefix_conv2d_backward)
register("prefix_conv2d", fake=_fake, backward=_backward, setup_context=_setup)
register("prefix_conv2d_backward", fake=_fake_backward)

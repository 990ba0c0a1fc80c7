"""Checks that the ops on prefixes of channels share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taskloom.ops._checks import check_floating, check_shape
from taskloom.ops.routed._conv_checks import check_integer, check_kernel


def check_weights(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, dims: int) -> None:
    """Raise unless weight has ``dims`` dimensions, bias its first one, and both x's dtype."""
    check_floating(op, "x", x)
    check_floating(op, "weight", weight)
    if weight.dim() != dims:
        raise ValueError(f"{op}: weight: expected {dims} dimensions, got shape {tuple(weight.shape)}")
    for name, one in (("weight", weight), ("bias", bias)):
        if one is None:
            continue
        check_floating(op, name, one)
        if one.dtype != x.dtype:
            raise TypeError(f"{op}: {name}: expected {x.dtype} as x, got {one.dtype}")
    if bias is not None:
        check_shape(op, "bias", bias, weight.shape[:1], "the rows of weight")


def check_width(op: str, name: str, width: int | None, most: int) -> int:
    """The number of active channels, ``most`` where none is given; raise unless it is in 1..most."""
    if width is None:
        return most
    check_integer(op, name, width)
    if not 1 <= width <= most:
        raise ValueError(f"{op}: {name}: expected 1 to {most}, the channels of weight, got {width}")
    return width


def check_inputs(op: str, inputs: int, most: int) -> None:
    """Raise unless x has as many channels as weight, or fewer."""
    if not 1 <= inputs <= most:
        raise ValueError(f"{op}: x: expected 1 to {most} channels, those of weight, got {inputs}")


def output_size(op: str, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Height and width of a convolution's result; raise where there would be none."""
    check_kernel(op, weight)
    sizes = []
    for place in (0, 1):
        size, kernel = x.shape[2 + place] + 2 * padding[place], dilation[place] * (weight.shape[2 + place] - 1) + 1
        if size < kernel:
            raise ValueError(
                f"{op}: x: expected at least the {tuple(weight.shape[2:])} kernel's extent in height and width, with padding, "
                f"got {tuple(x.shape)}"
            )
        sizes.append((size - kernel) // stride[place] + 1)
    return sizes


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel lie next to each other, so that those of the result do too; a view of a prefix counts."""
    return bool(x.dim() == 4 and x.stride(1) == 1 and x.shape[1] > 1 and x.stride(3) > 1)


def empty_result(x: Tensor, shape: Sequence[int]) -> Tensor:
    """An empty tensor of x's dtype, channels last where x's channels lie so, else contiguous."""
    if not is_channels_last(x):
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    samples, channels, height, width = shape
    return torch.empty((samples, height, width, channels), dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)

"""ragged_prefix_conv2d on a CPU: samples of the same prefixes together, a prefix convolution for each group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from taskloom.ops.routed._prefix_checks import empty_result, is_channels_last, output_size
from taskloom.ops.routed._prefix_products import gradients
from taskloom.reference.arithmetic import accumulation_dtype, without_autocast


def _groups(in_channels: Tensor, out_channels: Tensor) -> Iterator[tuple[int, int, Tensor | slice]]:
    """Every pair of prefixes with its samples in order, as a slice where they lie one after the other."""
    samples: dict[tuple[int, int], list[int]] = {}
    for place, prefixes in enumerate(zip(in_channels.tolist(), out_channels.tolist(), strict=True)):
        samples.setdefault(prefixes, []).append(place)
    for (inputs, outputs), places in samples.items():
        if places[-1] - places[0] == len(places) - 1:
            yield inputs, outputs, slice(places[0], places[-1] + 1)
        else:
            yield inputs, outputs, torch.tensor(places)


def _chosen(values: Tensor, samples: Tensor | slice) -> Tensor:
    """Some samples, laid out as all are: the layout decides in which order a product is summed."""
    chosen = values[samples]
    if is_channels_last(chosen) == is_channels_last(values):
        return chosen
    return empty_result(values, chosen.shape).copy_(chosen)


@without_autocast
def ragged_prefix_conv2d(
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
    """A prefix convolution for each group of samples; what its samples do not use of x is not read."""
    steps = (stride, padding, dilation)
    sizes = (x.shape[0], weight.shape[0], *output_size("ragged_prefix_conv2d", x, weight, *steps))
    out, convolve = empty_result(x, sizes), torch.ops.taskloom.prefix_conv2d.default
    for inputs, outputs, samples in _groups(in_channels, out_channels):
        out[:, :outputs][samples] = convolve(_chosen(x[:, :inputs], samples), weight, bias, outputs, *steps, 1)
        if zero_tail:
            out[:, outputs:][samples] = 0
    return out


@without_autocast
def ragged_prefix_conv2d_backward(
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
    """The gradients of each group, added in the order of their first samples."""
    dtype = accumulation_dtype(x)
    for_x = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    for_weight = torch.zeros(weight.shape, dtype=dtype, device=x.device) if needed[1] else None
    for_bias = torch.zeros(weight.shape[:1], dtype=dtype, device=x.device)
    for inputs, outputs, samples in _groups(in_channels, out_channels):
        g, part = gradient[:, :outputs][samples].to(dtype), weight[:outputs, :inputs].to(dtype)
        own = gradients(g, x[:, :inputs][samples].to(dtype), part, (stride, padding, dilation), 1, needed, for_weight)
        if own is not None:
            for_x[:, :inputs][samples] = own.to(x.dtype)
        for_bias[:outputs] += g.sum((0, 2, 3))
    found = [for_x] if needed[0] else []
    if for_weight is not None:
        found.append(for_weight.to(weight.dtype))
    if needed[2] and bias is not None:
        found.append(for_bias.to(bias.dtype))
    return found

"""Rows of the ops on prefixes of channels: half of the channels of layers as ResNet-50's stages have them, 8 samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

import taskloom
from harness import Contest, Row, Shape
from inputs import total_bytes, weights
from taskloom.ops.routed import (
    prefix_conv2d_backward,
    prefix_linear_backward,
    prefix_norm_backward,
    ragged_prefix_conv2d_backward,
)
from taskloom.ops.routed._prefix_products import _by_product, _by_unfolding

BATCH = 8
F32 = (torch.float32,)
# Sums over all pixels of a batch, and of the numbers that a norm's gradient subtracts.
SUMMED = 2e-5


def _image(channels: int, side: int, seed: int, dtype: torch.dtype) -> Tensor:
    return weights((BATCH * channels, side * side), seed, dtype).view(BATCH, channels, side, side)


def _conv_weight(outputs: int, inputs: int, kernel: int, dtype: torch.dtype) -> Tensor:
    return weights((outputs, inputs * kernel * kernel), 1, dtype).view(outputs, inputs, kernel, kernel) / (inputs * kernel)


def _mask(channels: int, active: int, dtype: torch.dtype) -> Tensor:
    return (torch.arange(channels) < active).to(dtype)[:, None, None]


def conv_contest(kernel: int, inputs: int, outputs: int, shape: Shape, dtype: torch.dtype) -> Contest:
    """A layer of ``inputs`` and ``outputs`` times the shape's channels, at half width."""
    channels, side = shape
    whole_in, whole_out = inputs * channels, outputs * channels
    active_in, active_out = whole_in // 2, whole_out // 2
    whole, weight = _image(whole_in, side, 0, dtype), _conv_weight(whole_out, whole_in, kernel, dtype)
    x, padding = whole[:, :active_in].contiguous(), kernel // 2
    part, steps = weight[:active_out, :active_in], ((1, 1), (padding, padding), (1, 1))

    def by_products() -> Tensor:
        out = torch.empty(BATCH, active_out, side, side, dtype=dtype)
        return _by_product(x, part, None, out) if kernel == 1 else _by_unfolding(x, part, None, steps, out)

    mask_in, mask_out = _mask(whole_in, active_in, dtype), _mask(whole_out, active_out, dtype)
    return Contest(
        ours=lambda: taskloom.prefix_conv2d(x, weight, None, active_out, padding=padding),
        bytes=total_bytes(x) + total_bytes(x) * outputs // inputs + weight.nbytes // 4,
        peers={
            "dense with a mask": lambda: (functional.conv2d(whole * mask_in, weight, padding=padding) * mask_out)[:, :active_out],
            "conv2d of the sliced weight": lambda: functional.conv2d(x, part, padding=padding),
            "oneDNN on the view": lambda: torch.mkldnn_convolution(x, part, None, [padding, padding], [1, 1], [1, 1], 1),
            "a product for each sample": by_products,
        },
        sizes={"batch": BATCH, "kernel": kernel, "inputs": whole_in, "outputs": whole_out, "side": side},
    )


def conv_backward_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    channels, side = shape
    half = channels // 2
    x, weight = _image(half, side, 0, dtype), _conv_weight(channels, channels, 3, dtype)
    whole_gradient, whole = _image(channels, side, 2, dtype) * _mask(channels, half, dtype), _image(channels, side, 0, dtype)
    whole[:, :half], whole[:, half:] = x, 0
    gradient = whole_gradient[:, :half].contiguous()

    def torch_backward(gradient: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
        given = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])
        return list(torch.ops.aten.convolution_backward(gradient, x, weight, None, *given)[:2])

    def by_slice() -> list[Tensor]:
        for_x, part = torch_backward(gradient, x, weight[:half, :half])
        whole = torch.zeros_like(weight)
        whole[:half, :half] = part
        return [for_x, whole]

    def by_mask() -> list[Tensor]:
        for_x, for_weight = torch_backward(whole_gradient, whole, weight)
        return [for_x[:, :half], for_weight]

    return Contest(
        ours=lambda: prefix_conv2d_backward(gradient, x, weight, stride=(1, 1), padding=(1, 1), dilation=(1, 1)),
        bytes=3 * total_bytes(x) + 2 * weight.nbytes,
        peers={"dense with a mask": by_mask, "conv2d of the sliced weight": by_slice},
        sizes={"batch": BATCH, "kernel": 3},
        tolerance=SUMMED,
    )


def linear_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    rows, columns = shape
    whole, weight = weights((256, columns), 0, dtype), weights(shape, 1, dtype) / columns**0.5
    x, mask = whole[:, : columns // 2].contiguous(), (torch.arange(columns) < columns // 2).to(dtype)
    return Contest(
        ours=lambda: taskloom.prefix_linear(x, weight, None, rows // 2),
        bytes=total_bytes(x) + 256 * (rows // 2) * x.itemsize + weight.nbytes // 4,
        peers={
            "dense with a mask": lambda: functional.linear(whole * mask, weight)[:, : rows // 2],
            "linear of a copied slice": lambda: functional.linear(x, weight[: rows // 2, : columns // 2].contiguous()),
        },
        sizes={"rows": 256},
    )


def linear_backward_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    rows, columns = shape
    x, weight = weights((256, columns // 2), 0, dtype), weights(shape, 1, dtype) / columns**0.5
    gradient = weights((256, rows // 2), 2, dtype)

    def by_slice() -> list[Tensor]:
        whole = torch.zeros_like(weight)
        whole[: rows // 2, : columns // 2] = gradient.T @ x
        return [gradient @ weight[: rows // 2, : columns // 2], whole]

    return Contest(
        ours=lambda: prefix_linear_backward(gradient, x, weight),
        bytes=2 * total_bytes(x) + gradient.nbytes + weight.nbytes * 5 // 4,
        peers={"products, then into zeros": by_slice},
        sizes={"rows": 256},
        tolerance=SUMMED if dtype == torch.float32 else None,
    )


def _widths(channels: int) -> tuple[Tensor, Tensor]:
    """A quarter, a half, three quarters and all of the channels, in turn."""
    width = torch.tensor([max(1, channels * (1 + place % 4) // 4) for place in range(BATCH)])
    return width, width.roll(1)


def _sample_masks(channels: int, widths: Tensor, dtype: torch.dtype) -> Tensor:
    return (torch.arange(channels) < widths[:, None]).to(dtype)[:, :, None, None]


def ragged_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    channels, side = shape
    x, weight = _image(channels, side, 0, dtype), _conv_weight(channels, channels, 3, dtype)
    inputs, outputs = _widths(channels)
    mask_in, mask_out = _sample_masks(channels, inputs, dtype), _sample_masks(channels, outputs, dtype)
    pairs = list(zip(inputs.tolist(), outputs.tolist(), strict=True))

    def by_loop() -> Tensor:
        y = torch.zeros(BATCH, channels, side, side, dtype=dtype)
        for place, (i, o) in enumerate(pairs):
            y[place, :o] = functional.conv2d(x[place : place + 1, :i], weight[:o, :i], padding=1)[0]
        return y

    return Contest(
        ours=lambda: taskloom.ragged_prefix_conv2d(x, weight, in_channels=inputs, out_channels=outputs, padding=1),
        bytes=2 * x.nbytes + weight.nbytes,
        peers={"dense with masks": lambda: functional.conv2d(x * mask_in, weight, padding=1) * mask_out, "a loop over samples": by_loop},
        sizes={"batch": BATCH, "kernel": 3},
    )


def ragged_backward_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    channels, side = shape
    x, weight, gradient = _image(channels, side, 0, dtype), _conv_weight(channels, channels, 3, dtype), _image(channels, side, 2, dtype)
    inputs, outputs = _widths(channels)
    masked_x, masked = x * _sample_masks(channels, inputs, dtype), gradient * _sample_masks(channels, outputs, dtype)
    mask_in = _sample_masks(channels, inputs, dtype)

    def by_mask() -> list[Tensor]:
        given = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])
        for_x, for_weight, _ = torch.ops.aten.convolution_backward(masked, masked_x, weight, None, *given)
        return [for_x * mask_in, for_weight]

    steps = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    return Contest(
        ours=lambda: ragged_prefix_conv2d_backward(gradient, x, weight, in_channels=inputs, out_channels=outputs, **steps),
        bytes=3 * x.nbytes + 2 * weight.nbytes,
        peers={"dense with masks": by_mask},
        sizes={"batch": BATCH, "kernel": 3},
        tolerance=SUMMED,
    )


def norm_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    channels, side = shape
    x, weight, bias = _image(channels // 2, side, 0, dtype), weights((channels,), 1, dtype), weights((channels,), 2, dtype)
    part = weight[: channels // 2], bias[: channels // 2]
    return Contest(
        ours=lambda: taskloom.prefix_norm(x, weight, bias, relu=True),
        bytes=2 * x.nbytes,
        peers={"group_norm of slices, relu": lambda: functional.group_norm(x, 1, *part).relu_()},
        sizes={"batch": BATCH},
        tolerance=8e-3 if dtype == torch.bfloat16 else None,
    )


def norm_backward_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    channels, side = shape
    x, weight, bias = _image(channels // 2, side, 0, dtype), weights((channels,), 1, dtype), weights((channels,), 2, dtype)
    gradient = _image(channels // 2, side, 3, dtype)
    var, mean = torch.var_mean(x.flatten(1), 1, correction=0, keepdim=True)
    rstd, size = torch.rsqrt(var + 1e-5), (BATCH, channels // 2, side * side, 1)

    def by_torch() -> list[Tensor]:
        part = weight[: channels // 2]
        y = torch.native_group_norm(x, part, bias[: channels // 2], *size, 1e-5)[0]
        back = torch.ops.aten.threshold_backward(gradient, y, 0)
        for_x, *others = torch.ops.aten.native_group_norm_backward(back, x, mean, rstd, part, *size, [True] * 3)
        return [for_x, *(functional.pad(one, (0, channels - channels // 2)) for one in others)]

    return Contest(
        ours=lambda: prefix_norm_backward(gradient, x, weight, bias, mean, var, relu=True),
        bytes=3 * x.nbytes,
        peers={"group_norm's of slices": by_torch},
        sizes={"batch": BATCH},
        tolerance=SUMMED,
    )


Make = Callable[[Shape, torch.dtype], Contest]
_STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))


def _conv_rows() -> list[Row]:
    """The three convolutions of each stage's blocks: 1x1 from four times its channels, 3x3, and 1x1 back."""
    rows = []
    for channels, side in _STAGES:
        layers: dict[str, Make] = {
            "3x3": partial(conv_contest, 3, 1, 1),
            "1x1 reducing": partial(conv_contest, 1, 4, 1),
            "1x1 expanding": partial(conv_contest, 1, 1, 4),
        }
        rows += [
            Row("prefix_conv2d", make, f"{name}, {channels} at {side}", F32, (channels, side), memory=True) for name, make in layers.items()
        ]
    return rows


ROWS = (
    *_conv_rows(),
    *(Row("prefix_conv2d_backward", conv_backward_contest, f"3x3, {shape[0]} at {shape[1]}", F32, shape) for shape in _STAGES),
    Row("ragged_prefix_conv2d", ragged_contest, "4 widths, 256 at 14", F32, (256, 14), memory=True),
    Row("ragged_prefix_conv2d", ragged_contest, "4 widths, 64 at 56", F32, (64, 56), memory=True),
    Row("ragged_prefix_conv2d_backward", ragged_backward_contest, "4 widths, 256 at 14", F32, (256, 14)),
    Row("prefix_linear", linear_contest, "256 rows", memory=True),
    Row("prefix_linear_backward", linear_backward_contest, "256 rows", memory=True),
    Row("prefix_norm", norm_contest, "layer, ReLU, 256 at 56", shape=(256, 56), memory=True),
    Row("prefix_norm_backward", norm_backward_contest, "layer, ReLU, 256 at 56", F32, shape=(256, 56)),
)

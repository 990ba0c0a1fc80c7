"""Rows of window_linear and window_conv2d: 8 samples, each with a window of half the channels that starts anywhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

import taskloom
from harness import Contest, Row, Shape
from inputs import total_bytes, weights
from taskloom.ops.routed import window_conv2d_backward, window_linear_backward

SAMPLES, ROWS_OF_A_SAMPLE = 8, 256
TRIPLE = (True, True, True)


def starts(samples: int, channels: int, width: int) -> Tensor:
    return torch.randint(0, channels - width + 1, (samples,), generator=torch.Generator().manual_seed(3))


def mask_of(start: Tensor, width: int, channels: int, dtype: torch.dtype) -> Tensor:
    channel = torch.arange(channels)
    return ((channel >= start[:, None]) & (channel < start[:, None] + width)).to(dtype)


def linear_contest(rows: int, samples: int) -> Callable[[Shape, torch.dtype], Contest]:
    """Forward, of so many samples of so many rows."""

    def make(shape: Shape, dtype: torch.dtype) -> Contest:
        outputs, channels = shape
        width = channels // 2
        x, weight = weights((samples * rows, channels), 1, dtype).view(samples, rows, channels), weights(shape, 2, dtype)
        start = starts(samples, channels, width)
        mask = mask_of(start, width, channels, dtype)[:, None]

        def by_loop() -> Tensor:
            ranges = [slice(first, first + width) for first in start.tolist()]
            return torch.stack([functional.linear(one[:, part], weight[:, part]) for one, part in zip(x, ranges, strict=True)])

        return Contest(
            ours=lambda: taskloom.window_linear(x, weight, start=start, width=width),
            bytes=x.nbytes // 2 + weight.nbytes + samples * rows * outputs * x.itemsize,
            peers={"dense with a mask": lambda: functional.linear(x * mask, weight), "a loop over samples": by_loop},
            sizes={"samples": samples, "rows": rows, "width": width},
        )

    return make


def linear_backward_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    outputs, channels = shape
    width, rows = channels // 2, ROWS_OF_A_SAMPLE
    x, weight = weights((SAMPLES * rows, channels), 1, dtype).view(SAMPLES, rows, channels), weights(shape, 2, dtype)
    gradient, start = weights((SAMPLES * rows, outputs), 4, dtype).view(SAMPLES, rows, outputs), starts(SAMPLES, channels, width)
    mask = mask_of(start, width, channels, dtype)[:, None]

    def by_mask() -> list[Tensor]:
        flat = gradient.view(-1, outputs)
        return [(gradient @ weight) * mask, flat.T @ (x * mask).view(-1, channels), flat.sum(0)]

    return Contest(
        ours=lambda: window_linear_backward(gradient, x, weight, start, width, None, None, 0, None, TRIPLE),
        bytes=x.nbytes + x.nbytes // 2 + 2 * weight.nbytes + gradient.nbytes,
        peers={"dense with a mask": by_mask},
        sizes={"samples": SAMPLES, "rows": rows, "width": width},
    )


def _images(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """x, weight, start, width and mask of a 3 by 3 convolution; the shape is (channels, side of an image)."""
    channels, side = shape
    width = channels // 2
    x = weights((SAMPLES * channels, side * side), 1, dtype).view(SAMPLES, channels, side, side)
    weight = weights((channels, channels * 9), 2, dtype).view(channels, channels, 3, 3)
    start = starts(SAMPLES, channels, width)
    return x, weight, start, width, mask_of(start, width, channels, dtype)[:, :, None, None]


def conv_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    x, weight, start, width, mask = _images(shape, dtype)

    def by_loop() -> Tensor:
        ranges = [slice(first, first + width) for first in start.tolist()]
        parts = [functional.conv2d(one[None, part], weight[:, part], padding=1) for one, part in zip(x, ranges, strict=True)]
        return torch.cat(parts)

    return Contest(
        ours=lambda: taskloom.window_conv2d(x, weight, start=start, width=width, padding=1),
        bytes=x.nbytes // 2 + weight.nbytes + x.nbytes,
        peers={"dense with a mask": lambda: functional.conv2d(x * mask, weight, padding=1), "a loop over samples": by_loop},
        sizes={"samples": SAMPLES, "width": width},
    )


def conv_one_window_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    x, weight, _, width, mask = _images(shape, dtype)
    first = mask.shape[1] // 4
    mask = mask_of(torch.full((SAMPLES,), first), width, mask.shape[1], dtype)[:, :, None, None]
    seen = slice(first, first + width)
    return Contest(
        ours=lambda: taskloom.window_conv2d(x, weight, start=first, width=width, padding=1),
        bytes=x.nbytes // 2 + weight.nbytes // 2 + x.nbytes,
        peers={
            "dense with a mask": lambda: functional.conv2d(x * mask, weight, padding=1),
            "conv2d of the sliced weight": lambda: functional.conv2d(x[:, seen], weight[:, seen], padding=1),
        },
        sizes={"samples": SAMPLES, "width": width},
    )


def conv_backward_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    x, weight, start, width, mask = _images(shape, dtype)
    gradient = weights((x.numel() // x.shape[3], x.shape[3]), 4, dtype).view(x.shape)
    plain = ((1, 1), (1, 1), (1, 1))

    def by_mask() -> list[Tensor]:
        for_x, for_weight, for_bias = torch.ops.aten.convolution_backward(
            gradient, x * mask, weight, [len(weight)], *plain, False, (0, 0), 1, TRIPLE
        )
        return [for_x * mask, for_weight, for_bias]

    return Contest(
        ours=lambda: window_conv2d_backward(gradient, x, weight, start, width, None, None, 0, None, *plain, TRIPLE),
        bytes=total_bytes(gradient, x) + x.nbytes // 2 + 2 * weight.nbytes,
        peers={"dense with a mask": by_mask},
        sizes={"samples": SAMPLES, "width": width},
        tolerance=None if dtype != torch.float32 else 1e-5,
    )


LAYER, EARLY, LATE = (1024, 1024), (256, 28), (512, 14)
LONG = f"{SAMPLES} samples of {ROWS_OF_A_SAMPLE} rows"
ROWS = (
    Row(
        "window_linear",
        linear_contest(ROWS_OF_A_SAMPLE, SAMPLES),
        f"{SAMPLES} samples of {ROWS_OF_A_SAMPLE} rows",
        shape=LAYER,
        memory=True,
    ),
    Row("window_linear", linear_contest(1, 64), "64 samples of a row", shape=LAYER, memory=True),
    Row("window_linear_backward", linear_backward_contest, LONG, shape=LAYER, memory=True),
    Row("window_conv2d", conv_contest, "256 channels, 28 by 28", shape=EARLY, memory=True),
    Row("window_conv2d", conv_contest, "512 channels, 14 by 14", shape=LATE, memory=True),
    Row("window_conv2d", conv_one_window_contest, "256 channels, one window", shape=EARLY, memory=True),
    Row("window_conv2d_backward", conv_backward_contest, "256 channels, 28 by 28", shape=EARLY, memory=True),
    Row("window_conv2d_backward", conv_backward_contest, "512 channels, 14 by 14", shape=LATE, memory=True),
)

"""Rows of the routed family: convolutions of half of the channels, and batches of several widths."""

from __future__ import annotations

import math

import torch
from contest import Contest, Row
from inputs_on import normal
from torch import Tensor
from torch.nn import functional

import taskloom

CHANNELS, KERNEL = 256, 3


def _layer(device: torch.device, dtype: torch.dtype, entries: int) -> tuple[Tensor, Tensor]:
    """Images of 14 x 14 (4 x 4 in a rehearsal) whose channels lie last, and a layer's weight."""
    side, channels = (14, CHANNELS) if entries >= 1 << 16 else (4, 32)
    samples = max(4, 1 << int(math.log2(max(1, entries // (channels * side * side)))))
    x = normal(device, dtype, samples * channels * side * side, 0).view(samples, channels, side, side)
    weight = normal(device, dtype, channels * channels * KERNEL**2, 1, 1 / (KERNEL * channels**0.5))
    return x.contiguous(memory_format=torch.channels_last), weight.view(channels, channels, KERNEL, KERNEL)


def conv_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    whole, weight = _layer(device, dtype, entries)
    half = weight.shape[0] // 2
    x = whole[:, :half].contiguous(memory_format=torch.channels_last)
    mask = (torch.arange(2 * half, device=device) < half).to(dtype)[:, None, None]
    return Contest(
        ours=lambda: taskloom.prefix_conv2d(x, weight, None, half, padding=1),
        bytes=2 * x.nbytes + weight.nbytes // 4,
        peers={
            "dense with a mask": lambda: functional.conv2d(whole * mask, weight, padding=1) * mask,
            "conv2d of the sliced weight": lambda: functional.conv2d(x, weight[:half, :half], padding=1),
        },
    )


def ragged_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    x, weight = _layer(device, dtype, entries)
    channels = weight.shape[0]
    widths = (torch.arange(len(x), device=device) % 4 + 1) * channels // 4
    mask = (torch.arange(channels, device=device) < widths[:, None]).to(dtype)[:, :, None, None]
    groups = [(channels * part // 4, slice(part - 1, None, 4)) for part in (1, 2, 3, 4)]

    def by_groups() -> Tensor:
        y = torch.zeros_like(x)
        for width, samples in groups:
            y[samples, :width] = functional.conv2d(x[samples, :width], weight[:width, :width], padding=1)
        return y

    return Contest(
        ours=lambda: taskloom.ragged_prefix_conv2d(x, weight, in_channels=widths, out_channels=widths, padding=1),
        bytes=2 * x.nbytes + weight.nbytes,
        peers={
            "dense with masks": lambda: functional.conv2d(x * mask, weight, padding=1) * mask,
            "conv2d of each width": by_groups,
        },
    )


ROWS = (
    Row(
        "prefix_conv2d",
        "half width",
        conv_contest,
        (torch.bfloat16, torch.float16, torch.float32),
        bits=22,
        aim={"over": ("dense with a mask", 2.0)},
    ),
    Row("ragged_prefix_conv2d", "4 widths", ragged_contest, bits=19, aim={"over": ("conv2d of each width", 1.5)}),
)

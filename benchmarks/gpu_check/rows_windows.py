"""Rows of the routed family: windows of half the channels, one for each sample."""

from __future__ import annotations

import math

import torch
from contest import Contest, Row
from inputs_on import normal
from torch import Tensor
from torch.nn import functional

import taskloom

SAMPLES, WIDTH, OUTPUTS = 32, 1024, 1024


def _windows(device: torch.device, dtype: torch.dtype, channels: int) -> tuple[Tensor, int, Tensor]:
    """Starts, the width, and the masks."""
    width = channels // 2
    start = (torch.arange(SAMPLES, device=device) * 37) % (width + 1)
    channel = torch.arange(channels, device=device)
    return start, width, ((channel >= start[:, None]) & (channel < start[:, None] + width)).to(dtype)


def linear_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    rows = max(entries // (SAMPLES * WIDTH), 1)
    x = normal(device, dtype, SAMPLES * rows * WIDTH, 1).reshape(SAMPLES, rows, WIDTH)
    weight = normal(device, dtype, OUTPUTS * WIDTH, 2).reshape(OUTPUTS, WIDTH)
    start, width, mask = _windows(device, dtype, WIDTH)
    return Contest(
        ours=lambda: taskloom.window_linear(x, weight, start=start, width=width),
        bytes=x.nbytes // 2 + weight.nbytes + SAMPLES * rows * OUTPUTS * x.itemsize,
        peers={"dense with a mask": lambda: functional.linear(x * mask[:, None], weight)},
        compiled=(lambda x, weight, mask: functional.linear(x * mask[:, None], weight), (x, weight, mask)),
    )


def conv_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    channels = 256
    side = max(math.isqrt(entries // (SAMPLES * channels)), 3)
    x = normal(device, dtype, SAMPLES * channels * side * side, 1).reshape(SAMPLES, channels, side, side)
    weight = normal(device, dtype, channels * channels * 9, 2).reshape(channels, channels, 3, 3)
    start, width, mask = _windows(device, dtype, channels)
    return Contest(
        ours=lambda: taskloom.window_conv2d(x, weight, start=start, width=width, padding=1),
        bytes=x.nbytes // 2 + weight.nbytes + x.nbytes,
        peers={"dense with a mask": lambda: functional.conv2d(x * mask[:, :, None, None], weight, padding=1)},
    )


# The cards' target: 1.6 times as fast as a dense layer of a masked input, for half the channels.
AIM = {"over": ("dense with a mask", 1.6)}
ROWS = (
    Row("window_linear", f"{SAMPLES} windows of half", linear_contest, (torch.bfloat16, torch.float32), bits=24, aim=AIM),
    Row("window_conv2d", f"{SAMPLES} windows of half", conv_contest, (torch.bfloat16, torch.float32), bits=23, aim=AIM),
)

"""Rows of the norms of channel windows: DiT-L's tokens and ADM's maps, each sample with a window of eight tenths of the channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from contest import Contest, Row
from inputs_on import normal, total_bytes
from torch import Tensor

import taskloom

CHANNELS, TOKENS, GROUPS = 1024, 256, 32


def _windows(samples: int, channels: int, device: torch.device) -> tuple[Tensor, int, Tensor]:
    """Starts, width, and the mask that the official code multiplies by."""
    width = channels * 8 // 10
    start = (torch.arange(samples, device=device) * 37) % (channels - width + 1)
    place = torch.arange(channels, device=device)
    return start, width, (place >= start[:, None]) & (place < start[:, None] + width)


def layer_norm_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    channels = min(CHANNELS, entries // 8)
    x = normal(device, dtype, entries, 0).reshape(-1, min(TOKENS, entries // channels), channels)
    shift, scale = (normal(device, dtype, len(x) * channels, seed).reshape(len(x), channels) for seed in (1, 2))
    start, width, mask = _windows(len(x), channels, device)
    factor = mask[:, None].to(dtype)

    def eager(x: Tensor, shift: Tensor, scale: Tensor, factor: Tensor) -> Tensor:
        return F.layer_norm(factor * x, x.shape[2:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    given = (x, shift, scale, factor)
    return Contest(
        ours=lambda: taskloom.window_layer_norm(x, shift, scale, start=start, width=width),
        bytes=x.nbytes * (channels + width) // channels + total_bytes(shift, scale),
        peers={"mask, layer_norm, modulate": lambda: eager(*given)},
        compiled=(eager, given),
    )


def group_norm_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    channels = min(192, entries // 64) // GROUPS * GROUPS
    places = entries // (4 * channels)
    x = normal(device, dtype, 4 * channels * places, 0).reshape(4, channels, places)
    weight, bias = normal(device, dtype, channels, 1), normal(device, dtype, channels, 2)
    start, width, mask = _windows(4, channels, device)
    factor = mask[..., None].to(dtype)

    def eager(x: Tensor, weight: Tensor, bias: Tensor, factor: Tensor) -> Tensor:
        return F.silu(F.group_norm(factor * x, GROUPS, weight, bias))

    given = (x, weight, bias, factor)
    return Contest(
        ours=lambda: taskloom.window_group_norm_silu(x, weight, bias, groups=GROUPS, start=start, width=width),
        bytes=x.nbytes * (channels + width) // channels,
        peers={"mask, group_norm, silu": lambda: eager(*given)},
        compiled=(eager, given),
    )


def scale_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    channels = min(256, entries // 16)
    x = normal(device, dtype, entries, 0).reshape(4, channels, -1)
    scale, bias = normal(device, dtype, 4 * channels, 1).reshape(4, channels), normal(device, dtype, channels, 2)

    def eager(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return torch.relu(x * scale[..., None] + bias[:, None])

    return Contest(
        ours=lambda: taskloom.channel_scale(x, scale, bias, activation="relu"),
        bytes=2 * x.nbytes + total_bytes(scale, bias),
        peers={"scale, add, relu": lambda: eager(x, scale, bias)},
        compiled=(eager, (x, scale, bias)),
    )


ROWS = (
    Row("window_layer_norm", "modulated", layer_norm_contest, bits=25),
    Row("window_group_norm_silu", f"{GROUPS} groups", group_norm_contest, bits=25),
    Row("channel_scale", "relu", scale_contest, bits=25),
)

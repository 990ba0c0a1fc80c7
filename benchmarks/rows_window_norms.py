"""Rows of the norms of channel windows and of channel_scale: eight samples, each with a window of eight tenths of the channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import taskloom
from harness import Contest, Row, Shape
from inputs import total_bytes, weights
from taskloom.ops.routed import channel_scale_backward, window_group_norm_silu_backward, window_layer_norm_backward

SAMPLES, SHARE, GROUPS = 8, 0.8, 4


def _windows(channels: int) -> tuple[Tensor, int, Tensor]:
    """Starts, width, and the mask that the official code multiplies by, [N, C]."""
    width = int(channels * SHARE)
    start = torch.randint(0, channels - width + 1, (SAMPLES,), generator=torch.Generator().manual_seed(0))
    place = torch.arange(channels)
    return start, width, (place >= start[:, None]) & (place < start[:, None] + width)


def _sizes(width: int, channels: int) -> dict[str, float]:
    return {"samples": SAMPLES, "width": width, "channels": channels}


def _rows(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, a gradient like it, shift and scale."""
    rows, channels = shape
    x, gradient = (weights(shape, seed, dtype).reshape(SAMPLES, rows // SAMPLES, channels) for seed in (0, 3))
    return x, gradient, weights((SAMPLES, channels), 1, dtype), weights((SAMPLES, channels), 2, dtype)


def layer_norm_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    x, _, shift, scale = _rows(shape, dtype)
    start, width, mask = _windows(x.shape[2])
    factor = mask[:, None].to(dtype)
    share = width / x.shape[2]

    def eager() -> Tensor:
        return F.layer_norm(factor * x, x.shape[2:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    return Contest(
        ours=lambda: taskloom.window_layer_norm(x, shift, scale, start=start, width=width),
        bytes=int((1 + share) * x.nbytes) + total_bytes(shift, scale),
        peers={"mask, layer_norm, modulate": eager},
        sizes=_sizes(width, x.shape[2]),
    )


def layer_norm_backward_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    x, gradient, shift, scale = _rows(shape, dtype)
    start, width, mask = _windows(x.shape[2])
    factor = mask[:, None].to(dtype)
    _, mean, rstd = torch.ops.taskloom.window_layer_norm.default(x, shift, scale, start, width, None, 1e-6, True)
    leaves = [one.clone().requires_grad_() for one in (x, shift, scale)]
    y = F.layer_norm(factor * leaves[0], x.shape[2:], eps=1e-6) * (1 + leaves[2][:, None]) + leaves[1][:, None]
    share = width / x.shape[2]
    return Contest(
        ours=lambda: window_layer_norm_backward(gradient, x, shift, scale, mean, rstd, start=start, width=width),
        bytes=int((2 + share) * x.nbytes) + total_bytes(shift, scale, scale, mean, rstd),
        peers={"backward of mask, layer_norm, modulate": lambda: torch.autograd.grad(y, leaves, gradient, retain_graph=True)},
        sizes=_sizes(width, x.shape[2]),
    )


def _maps(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, a gradient like it, a factor and an addend for each channel."""
    channels = shape[1] // 8
    x, gradient = (weights(shape, seed, dtype).reshape(SAMPLES, channels, -1) for seed in (0, 3))
    return x, gradient, weights((channels,), 1, dtype), weights((channels,), 2, dtype)


def group_norm_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    x, _, weight, bias = _maps(shape, dtype)
    start, width, mask = _windows(x.shape[1])
    factor = mask[..., None].to(dtype)
    share = width / x.shape[1]
    return Contest(
        ours=lambda: taskloom.window_group_norm_silu(x, weight, bias, groups=GROUPS, start=start, width=width),
        bytes=int((1 + share) * x.nbytes) + total_bytes(weight, bias),
        peers={"mask, group_norm, silu": lambda: F.silu(F.group_norm(factor * x, GROUPS, weight, bias))},
        sizes=_sizes(width, x.shape[1]),
    )


def group_norm_backward_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    x, gradient, weight, bias = _maps(shape, dtype)
    start, width, mask = _windows(x.shape[1])
    factor = mask[..., None].to(dtype)
    _, mean, rstd = torch.ops.taskloom.window_group_norm_silu.default(x, weight, bias, GROUPS, start, width, None, 1e-5, True)
    leaves = [one.clone().requires_grad_() for one in (x, weight, bias)]
    y = F.silu(F.group_norm(factor * leaves[0], GROUPS, *leaves[1:]))
    share = width / x.shape[1]
    return Contest(
        ours=lambda: window_group_norm_silu_backward(gradient, x, weight, bias, mean, rstd, groups=GROUPS, start=start, width=width),
        bytes=int((2 + share) * x.nbytes) + total_bytes(weight, bias, weight, bias, mean, rstd),
        peers={"backward of mask, group_norm, silu": lambda: torch.autograd.grad(y, leaves, gradient, retain_graph=True)},
        sizes=_sizes(width, x.shape[1]),
    )


def channel_scale_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    x, _, bias, _ = _maps(shape, dtype)
    start, width, mask = _windows(x.shape[1])
    factor, scale = mask[..., None].to(dtype), weights((SAMPLES, x.shape[1]), 4, dtype)
    share = width / x.shape[1]
    return Contest(
        ours=lambda: taskloom.channel_scale(x, scale, bias, start=start, width=width, activation="relu"),
        bytes=int((1 + share) * x.nbytes) + total_bytes(scale, bias),
        peers={"scale, add, relu, mask": lambda: torch.relu(x * scale[..., None] + bias[:, None]) * factor},
        sizes=_sizes(width, x.shape[1]),
    )


def channel_scale_backward_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    x, gradient, bias, _ = _maps(shape, dtype)
    start, width, mask = _windows(x.shape[1])
    factor, scale = mask[..., None].to(dtype), weights((SAMPLES, x.shape[1]), 4, dtype)
    leaves = [one.clone().requires_grad_() for one in (x, scale, bias)]
    y = torch.relu(leaves[0] * leaves[1][..., None] + leaves[2][:, None]) * factor
    share = width / x.shape[1]
    return Contest(
        ours=lambda: channel_scale_backward(gradient, x, scale, bias, start=start, width=width, activation="relu"),
        bytes=int((1 + 2 * share) * x.nbytes) + total_bytes(scale, scale, bias, bias),
        peers={"backward of scale, add, relu, mask": lambda: torch.autograd.grad(y, leaves, gradient, retain_graph=True)},
        sizes=_sizes(width, x.shape[1]),
    )


ROWS = (
    Row("window_layer_norm", layer_norm_contest, "modulated", memory=True),
    Row("window_layer_norm_backward", layer_norm_backward_contest, "modulated", memory=True),
    Row("window_group_norm_silu", group_norm_contest, f"{GROUPS} groups", memory=True),
    Row("window_group_norm_silu_backward", group_norm_backward_contest, f"{GROUPS} groups", memory=True),
    Row("channel_scale", channel_scale_contest, "relu", memory=True),
    Row("channel_scale_backward", channel_scale_backward_contest, "relu", memory=True),
)

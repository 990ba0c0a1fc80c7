"""What one call of each norm of channel windows, and of channel_scale, costs on tensors of a few entries, beside torch's own norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import taskloom
from taskloom.ops.routed import channel_scale_backward, window_group_norm_silu_backward, window_layer_norm_backward

# A call takes a window for each sample beside what the peer takes, and looks at it.
LIMIT = 4.0

Call = Callable[[], Any]


def calls() -> list[tuple[str, Call, Call, str, Call | None]]:
    """Op, ours, peer, the peer's name and the native op alone."""
    ops = torch.ops.taskloom
    x, shift, scale, start = torch.randn(2, 2, 4), torch.randn(2, 4), torch.randn(2, 4), torch.tensor([0, 1])
    weight, bias = torch.randn(2), torch.randn(2)
    layer: dict[str, Any] = {"start": start, "width": 3}
    group: dict[str, Any] = {"start": start, "width": 1, "groups": 1}
    _, mean, rstd = ops.window_layer_norm.default(x, shift, scale, start, 3, None, 1e-6, True)
    _, group_mean, group_rstd = ops.window_group_norm_silu.default(x, weight, bias, 1, start, 1, None, 1e-5, True)
    tracked = [one.clone().requires_grad_() for one in (x, shift, scale, weight, bias)]
    normal = F.layer_norm(tracked[0], (4,)) * (1 + tracked[2][:, None]) + tracked[1][:, None]
    grouped = F.silu(F.group_norm(tracked[0], 1, tracked[3], tracked[4]))
    gated = torch.relu(tracked[0] * tracked[1][:, :2, None])

    def slopes(y: torch.Tensor, *leaves: torch.Tensor) -> Call:
        return lambda: torch.autograd.grad(y, leaves, x, retain_graph=True)

    gates, whole = shift[:, :2].contiguous(), (None, 2, None, "relu")
    return [
        (
            "window_layer_norm",
            lambda: taskloom.window_layer_norm(x, shift, scale, **layer),
            lambda: F.layer_norm(x, (4,)) * (1 + scale[:, None]) + shift[:, None],
            "layer_norm, modulated",
            lambda: ops.window_layer_norm.default(x, shift, scale, start, 3, None, 1e-6, True)[0],
        ),
        (
            "window_layer_norm_backward",
            lambda: window_layer_norm_backward(x, x, shift, scale, mean, rstd, **layer),
            slopes(normal, *tracked[:3]),
            "backward of layer_norm, modulated",
            lambda: ops.window_layer_norm_backward.default(x, x, shift, scale, start, 3, None, mean, rstd, None, None, True, True, True),
        ),
        (
            "window_group_norm_silu",
            lambda: taskloom.window_group_norm_silu(x, weight, bias, **group),
            lambda: F.silu(F.group_norm(x, 1, weight, bias)),
            "group_norm, silu",
            lambda: ops.window_group_norm_silu.default(x, weight, bias, 1, start, 1, None, 1e-5, True)[0],
        ),
        (
            "window_group_norm_silu_backward",
            lambda: window_group_norm_silu_backward(x, x, weight, bias, group_mean, group_rstd, **group),
            slopes(grouped, tracked[0], tracked[3], tracked[4]),
            "backward of group_norm, silu",
            lambda: ops.window_group_norm_silu_backward.default(
                x, x, weight, bias, 1, start, 1, None, group_mean, group_rstd, None, None, True, True, True
            ),
        ),
        (
            "channel_scale",
            lambda: taskloom.channel_scale(x, gates, activation="relu"),
            lambda: torch.relu(x * gates[..., None]),
            "scale, relu",
            lambda: ops.channel_scale.default(x, gates, None, *whole),
        ),
        (
            "channel_scale_backward",
            lambda: channel_scale_backward(x, x, gates, activation="relu"),
            slopes(gated, tracked[0], tracked[1]),
            "backward of scale, relu",
            lambda: ops.channel_scale_backward.default(x, x, gates, None, *whole, True, True, True),
        ),
    ]

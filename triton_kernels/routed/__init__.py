"""Launchers of the routed family's Triton kernels, with the arguments of the ops of the same names in ``torch.ops.taskloom``."""

from __future__ import annotations

from taskloom.triton_kernels.routed.channel_scale import channel_scale, channel_scale_backward
from taskloom.triton_kernels.routed.prefix_conv2d import prefix_conv2d, prefix_conv2d_backward
from taskloom.triton_kernels.routed.prefix_linear import prefix_linear, prefix_linear_backward
from taskloom.triton_kernels.routed.prefix_norm import prefix_norm, prefix_norm_backward
from taskloom.triton_kernels.routed.ragged_prefix_conv2d import ragged_prefix_conv2d, ragged_prefix_conv2d_backward
from taskloom.triton_kernels.routed.window_group_norm import window_group_norm_silu, window_group_norm_silu_backward
from taskloom.triton_kernels.routed.window_layer_norm import window_layer_norm, window_layer_norm_backward
from taskloom.triton_kernels.routed.window_products import (
    window_conv2d,
    window_conv2d_backward,
    window_linear,
    window_linear_backward,
)

__all__ = [
    "channel_scale",
    "channel_scale_backward",
    "prefix_conv2d",
    "prefix_conv2d_backward",
    "prefix_linear",
    "prefix_linear_backward",
    "prefix_norm",
    "prefix_norm_backward",
    "ragged_prefix_conv2d",
    "ragged_prefix_conv2d_backward",
    "window_conv2d",
    "window_conv2d_backward",
    "window_group_norm_silu",
    "window_group_norm_silu_backward",
    "window_layer_norm",
    "window_layer_norm_backward",
    "window_linear",
    "window_linear_backward",
]

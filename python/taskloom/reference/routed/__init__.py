"""The routed family in plain torch."""

from __future__ import annotations

from taskloom.reference.routed.channel_scale import channel_scale, channel_scale_backward
from taskloom.reference.routed.prefix import (
    prefix_conv2d,
    prefix_conv2d_backward,
    prefix_linear,
    prefix_linear_backward,
    ragged_prefix_conv2d,
    ragged_prefix_conv2d_backward,
)
from taskloom.reference.routed.prefix_norm import prefix_norm, prefix_norm_backward
from taskloom.reference.routed.window_conv2d import window_conv2d, window_conv2d_backward
from taskloom.reference.routed.window_linear import window_linear, window_linear_backward
from taskloom.reference.routed.window_norms import (
    window_group_norm_silu,
    window_group_norm_silu_backward,
    window_layer_norm,
    window_layer_norm_backward,
    window_norm_conv2d,
    window_norm_linear,
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
    "window_norm_conv2d",
    "window_norm_linear",
]

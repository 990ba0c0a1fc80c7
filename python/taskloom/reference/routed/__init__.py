"""The routed family in plain torch."""

from __future__ import annotations

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

__all__ = [
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
    "window_linear",
    "window_linear_backward",
]

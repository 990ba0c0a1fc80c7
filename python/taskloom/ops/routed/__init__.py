"""The routed family: layers that see a part of their channels."""

from __future__ import annotations

from taskloom.ops.routed.window_conv2d import window_conv2d, window_conv2d_backward
from taskloom.ops.routed.window_linear import window_linear, window_linear_backward

__all__ = [
    "window_conv2d",
    "window_conv2d_backward",
    "window_linear",
    "window_linear_backward",
]

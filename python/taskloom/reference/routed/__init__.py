"""The routed family in plain torch."""

from __future__ import annotations

from taskloom.reference.routed.window_conv2d import window_conv2d, window_conv2d_backward
from taskloom.reference.routed.window_linear import window_linear, window_linear_backward

__all__ = [
    "window_conv2d",
    "window_conv2d_backward",
    "window_linear",
    "window_linear_backward",
]

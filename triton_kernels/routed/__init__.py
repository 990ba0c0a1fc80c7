"""Launchers of the routed family's Triton kernels, with the arguments of the ops of the same names in ``torch.ops.taskloom``."""

from __future__ import annotations

from taskloom.triton_kernels.routed.window_products import (
    window_conv2d,
    window_conv2d_backward,
    window_linear,
    window_linear_backward,
)

__all__ = [
    "window_conv2d",
    "window_conv2d_backward",
    "window_linear",
    "window_linear_backward",
]

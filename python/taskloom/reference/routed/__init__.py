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

__all__ = [
    "prefix_conv2d",
    "prefix_conv2d_backward",
    "prefix_linear",
    "prefix_linear_backward",
    "prefix_norm",
    "prefix_norm_backward",
    "ragged_prefix_conv2d",
    "ragged_prefix_conv2d_backward",
]

"""The lowrank family: kernelized low-rank merges."""

from __future__ import annotations

from taskloom.ops.lowrank.kernel_linear import kernel_linear, kernel_linear_backward
from taskloom.ops.lowrank.kernel_merge import kernel_merge, kernel_merge_backward, kernel_quantile
from taskloom.reference.lowrank import rmm_fit, rmm_linear, rmm_reconstruct

__all__ = [
    "kernel_linear",
    "kernel_linear_backward",
    "kernel_merge",
    "kernel_merge_backward",
    "kernel_quantile",
    "rmm_fit",
    "rmm_linear",
    "rmm_reconstruct",
]

"""The lowrank family: kernelized low-rank merges."""

from __future__ import annotations

from taskloom.ops.lowrank.kernel_linear import kernel_linear, kernel_linear_backward
from taskloom.ops.lowrank.kernel_merge import kernel_merge, kernel_merge_backward, kernel_quantile
from taskloom.ops.lowrank.rmm_fit import rmm_fit
from taskloom.ops.lowrank.rmm_linear import rmm_linear
from taskloom.ops.lowrank.rmm_reconstruct import rmm_reconstruct

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

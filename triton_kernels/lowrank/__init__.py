"""Launchers of the lowrank family's Triton kernels, with the arguments of the ops of the same names in ``torch.ops.taskloom``."""

from __future__ import annotations

from taskloom.triton_kernels.lowrank.kernel_linear import kernel_linear, kernel_linear_backward
from taskloom.triton_kernels.lowrank.kernel_merge import (
    kernel_merge,
    kernel_merge_backward,
    kernel_merge_out,
    kernel_quantile,
)
from taskloom.triton_kernels.lowrank.lowrank_apply import lowrank_apply, lowrank_apply_backward
from taskloom.triton_kernels.lowrank.lowrank_merge import (
    lowrank_merge,
    lowrank_merge_,
    lowrank_merge_backward,
    lowrank_merge_tasks,
    lowrank_norm,
)
from taskloom.triton_kernels.lowrank.rmm_fit import rmm_fit
from taskloom.triton_kernels.lowrank.rmm_linear import rmm_linear
from taskloom.triton_kernels.lowrank.rmm_reconstruct import rmm_reconstruct

__all__ = [
    "kernel_linear",
    "kernel_linear_backward",
    "kernel_merge",
    "kernel_merge_backward",
    "kernel_merge_out",
    "kernel_quantile",
    "lowrank_apply",
    "lowrank_apply_backward",
    "lowrank_merge",
    "lowrank_merge_",
    "lowrank_merge_backward",
    "lowrank_merge_tasks",
    "lowrank_norm",
    "rmm_fit",
    "rmm_linear",
    "rmm_reconstruct",
]

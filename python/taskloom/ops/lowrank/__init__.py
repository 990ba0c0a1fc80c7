"""The lowrank family: kernelized low-rank merges."""

from __future__ import annotations

from taskloom.ops.lowrank.dora_merge import dora_merge, lowrank_norm
from taskloom.ops.lowrank.kernel_linear import kernel_linear, kernel_linear_backward
from taskloom.ops.lowrank.kernel_merge import kernel_merge, kernel_merge_backward, kernel_quantile
from taskloom.ops.lowrank.lowrank_apply import lowrank_apply, lowrank_apply_backward
from taskloom.ops.lowrank.lowrank_merge import lowrank_merge, lowrank_merge_, lowrank_merge_backward, lowrank_unmerge_
from taskloom.ops.lowrank.lowrank_merge_tasks import lowrank_merge_tasks
from taskloom.ops.lowrank.rmm_fit import rmm_fit
from taskloom.ops.lowrank.rmm_linear import rmm_linear
from taskloom.ops.lowrank.rmm_reconstruct import rmm_reconstruct

__all__ = [
    "dora_merge",
    "kernel_linear",
    "kernel_linear_backward",
    "kernel_merge",
    "kernel_merge_backward",
    "kernel_quantile",
    "lowrank_apply",
    "lowrank_apply_backward",
    "lowrank_merge",
    "lowrank_merge_",
    "lowrank_merge_backward",
    "lowrank_merge_tasks",
    "lowrank_norm",
    "lowrank_unmerge_",
    "rmm_fit",
    "rmm_linear",
    "rmm_reconstruct",
]

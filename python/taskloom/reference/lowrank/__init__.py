"""The lowrank family in plain torch."""

from __future__ import annotations

from taskloom.reference.lowrank.kernel_merge import (
    kernel_linear,
    kernel_linear_backward,
    kernel_merge,
    kernel_merge_backward,
    kernel_quantile,
)
from taskloom.reference.lowrank.lowrank_apply import lowrank_apply, lowrank_apply_backward
from taskloom.reference.lowrank.lowrank_merge import (
    dora_merge,
    lowrank_merge,
    lowrank_merge_,
    lowrank_merge_backward,
    lowrank_merge_tasks,
    lowrank_norm,
)
from taskloom.reference.lowrank.rmm import rmm_fit, rmm_linear, rmm_reconstruct

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
    "rmm_fit",
    "rmm_linear",
    "rmm_reconstruct",
]

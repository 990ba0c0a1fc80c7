"""Launchers of the lowrank family's Triton kernels, with the arguments of the ops of the same names in ``torch.ops.taskloom``."""

from __future__ import annotations

from taskloom.triton_kernels.lowrank.lowrank_apply import lowrank_apply, lowrank_apply_backward
from taskloom.triton_kernels.lowrank.lowrank_merge import (
    lowrank_merge,
    lowrank_merge_,
    lowrank_merge_backward,
    lowrank_merge_tasks,
    lowrank_norm,
)

__all__ = [
    "lowrank_apply",
    "lowrank_apply_backward",
    "lowrank_merge",
    "lowrank_merge_",
    "lowrank_merge_backward",
    "lowrank_merge_tasks",
    "lowrank_norm",
]

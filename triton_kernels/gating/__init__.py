"""Launchers of the gating family's Triton kernels, with the arguments of the ops of the same names in ``torch.ops.taskloom``."""

from __future__ import annotations

from taskloom.triton_kernels.gating.expert_combine import expert_combine, expert_combine_backward
from taskloom.triton_kernels.gating.expert_sort import expert_sort
from taskloom.triton_kernels.gating.manifold_loss import manifold_loss, manifold_loss_backward
from taskloom.triton_kernels.gating.topk_gate import topk_gate
from taskloom.triton_kernels.gating.topk_gate_backward import topk_gate_backward

__all__ = [
    "expert_combine",
    "expert_combine_backward",
    "expert_sort",
    "manifold_loss",
    "manifold_loss_backward",
    "topk_gate",
    "topk_gate_backward",
]

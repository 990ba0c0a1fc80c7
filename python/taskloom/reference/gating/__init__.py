"""The gating family in plain torch: the definition of each op."""

from __future__ import annotations

from taskloom.reference.gating.expert_combine import expert_combine, expert_combine_backward
from taskloom.reference.gating.expert_sort import expert_sort
from taskloom.reference.gating.manifold_loss import manifold_loss, manifold_loss_backward
from taskloom.reference.gating.topk_gate import topk_gate, topk_gate_backward

__all__ = [
    "expert_combine",
    "expert_combine_backward",
    "expert_sort",
    "manifold_loss",
    "manifold_loss_backward",
    "topk_gate",
    "topk_gate_backward",
]

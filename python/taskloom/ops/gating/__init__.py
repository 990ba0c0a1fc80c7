"""The gating family: gates that weigh experts, and what moves rows to experts and back."""

from __future__ import annotations

from taskloom.ops.gating.expert_combine import expert_combine, expert_combine_backward
from taskloom.ops.gating.expert_sort import ExpertOrder, expert_sort
from taskloom.ops.gating.manifold_loss import manifold_loss, manifold_loss_backward
from taskloom.ops.gating.router_losses import gate_probabilities, load_balance_loss, router_z_loss
from taskloom.ops.gating.topk_gate import TopKGate, topk_gate, topk_gate_backward

__all__ = [
    "ExpertOrder",
    "TopKGate",
    "expert_combine",
    "expert_combine_backward",
    "expert_sort",
    "gate_probabilities",
    "load_balance_loss",
    "manifold_loss",
    "manifold_loss_backward",
    "router_z_loss",
    "topk_gate",
    "topk_gate_backward",
]

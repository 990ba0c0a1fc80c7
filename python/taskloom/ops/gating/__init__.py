"""The gating family: gates that weigh experts, and what moves rows to experts and back."""

from __future__ import annotations

from taskloom.ops.gating.topk_gate import TopKGate, topk_gate, topk_gate_backward

__all__ = ["TopKGate", "topk_gate", "topk_gate_backward"]

"""The gating family in plain torch: the definition of each op."""

from __future__ import annotations

from taskloom.reference.gating.topk_gate import topk_gate, topk_gate_backward

__all__ = ["topk_gate", "topk_gate_backward"]

"""The gating family: gates that weigh experts, and what moves rows to experts and back."""

from __future__ import annotations

from taskloom.ops.gating.batch_norm_silu import batch_norm_silu, batch_norm_silu_backward
from taskloom.ops.gating.lora_feature_gate import lora_feature_gate, lora_feature_gate_backward

__all__ = [
    "batch_norm_silu",
    "batch_norm_silu_backward",
    "lora_feature_gate",
    "lora_feature_gate_backward",
]

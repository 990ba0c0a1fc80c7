"""The gating family in plain torch: the definition of each op."""

from __future__ import annotations

from taskloom.reference.gating.batch_norm_silu import batch_norm_silu, batch_norm_silu_backward
from taskloom.reference.gating.lora_feature_gate import lora_feature_gate, lora_feature_gate_backward

__all__ = [
    "batch_norm_silu",
    "batch_norm_silu_backward",
    "lora_feature_gate",
    "lora_feature_gate_backward",
]

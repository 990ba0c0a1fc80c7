"""The gating family in plain torch: the definition of each op."""

from __future__ import annotations

from taskloom.reference.gating.batch_norm_silu import batch_norm_silu, batch_norm_silu_backward
from taskloom.reference.gating.lora_feature_gate import lora_feature_gate, lora_feature_gate_backward
from taskloom.reference.gating.multi_gate import multi_gate_combine, multi_gate_combine_backward
from taskloom.reference.gating.stream_softmax import stream_softmax_mix, stream_softmax_mix_backward

__all__ = [
    "batch_norm_silu",
    "batch_norm_silu_backward",
    "lora_feature_gate",
    "lora_feature_gate_backward",
    "multi_gate_combine",
    "multi_gate_combine_backward",
    "stream_softmax_mix",
    "stream_softmax_mix_backward",
]

"""The gating family: gates that weigh experts, and what moves rows to experts and back."""

from __future__ import annotations

from taskloom.ops.gating.batch_norm_silu import batch_norm_silu, batch_norm_silu_backward
from taskloom.ops.gating.lora_feature_gate import lora_feature_gate, lora_feature_gate_backward
from taskloom.ops.gating.multi_gate import GateStatistics, gate_statistics, multi_gate_combine, multi_gate_combine_backward
from taskloom.ops.gating.stream_softmax import SoftmaxMix, stream_softmax_mix, stream_softmax_mix_backward

__all__ = [
    "GateStatistics",
    "SoftmaxMix",
    "batch_norm_silu",
    "batch_norm_silu_backward",
    "gate_statistics",
    "lora_feature_gate",
    "lora_feature_gate_backward",
    "multi_gate_combine",
    "multi_gate_combine_backward",
    "stream_softmax_mix",
    "stream_softmax_mix_backward",
]

"""The gating family: gates that weigh experts, and what moves rows to experts and back."""

from __future__ import annotations

from taskloom.ops.gating.multi_gate import GateStatistics, gate_statistics, multi_gate_combine, multi_gate_combine_backward
from taskloom.ops.gating.stream_softmax import SoftmaxMix, stream_softmax_mix, stream_softmax_mix_backward

__all__ = [
    "GateStatistics",
    "SoftmaxMix",
    "gate_statistics",
    "multi_gate_combine",
    "multi_gate_combine_backward",
    "stream_softmax_mix",
    "stream_softmax_mix_backward",
]

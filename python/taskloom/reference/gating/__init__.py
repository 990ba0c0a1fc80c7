"""The gating family in plain torch: the definition of each op."""

from __future__ import annotations

from taskloom.reference.gating.multi_gate import multi_gate_combine, multi_gate_combine_backward
from taskloom.reference.gating.stream_softmax import stream_softmax_mix, stream_softmax_mix_backward

__all__ = [
    "multi_gate_combine",
    "multi_gate_combine_backward",
    "stream_softmax_mix",
    "stream_softmax_mix_backward",
]

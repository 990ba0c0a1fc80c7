"""The gating family: gates that weigh experts, and what moves rows to experts and back."""

from __future__ import annotations

from taskloom.ops.gating.batch_norm_silu import (
    batch_norm_silu,
    batch_norm_silu_backward,
)
from taskloom.ops.gating.expert_combine import (
    expert_combine,
    expert_combine_backward,
)
from taskloom.ops.gating.expert_sort import (
    ExpertOrder,
    expert_sort,
)
from taskloom.ops.gating.lora_feature_gate import (
    lora_feature_gate,
    lora_feature_gate_backward,
)
from taskloom.ops.gating.manifold_loss import (
    manifold_loss,
    manifold_loss_backward,
)
from taskloom.ops.gating.multi_gate import (
    GateStatistics,
    gate_statistics,
    multi_gate_combine,
    multi_gate_combine_backward,
)
from taskloom.ops.gating.router_losses import (
    gate_probabilities,
    load_balance_loss,
    router_z_loss,
)
from taskloom.ops.gating.stream_softmax import (
    SoftmaxMix,
    stream_softmax_mix,
    stream_softmax_mix_backward,
)
from taskloom.ops.gating.topk_gate import (
    TopKGate,
    topk_gate,
    topk_gate_backward,
)

__all__ = [
    "ExpertOrder",
    "GateStatistics",
    "SoftmaxMix",
    "TopKGate",
    "batch_norm_silu",
    "batch_norm_silu_backward",
    "expert_combine",
    "expert_combine_backward",
    "expert_sort",
    "gate_probabilities",
    "gate_statistics",
    "load_balance_loss",
    "lora_feature_gate",
    "lora_feature_gate_backward",
    "manifold_loss",
    "manifold_loss_backward",
    "multi_gate_combine",
    "multi_gate_combine_backward",
    "router_z_loss",
    "stream_softmax_mix",
    "stream_softmax_mix_backward",
    "topk_gate",
    "topk_gate_backward",
]

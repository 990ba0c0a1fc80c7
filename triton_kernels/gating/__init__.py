"""Launchers of the gating family's Triton kernels, with the arguments of the ops of the same names in ``torch.ops.taskloom``."""

from __future__ import annotations

from taskloom.triton_kernels.gating.batch_norm_silu import (
    batch_norm_silu,
    batch_norm_silu_backward,
)
from taskloom.triton_kernels.gating.expert_combine import (
    expert_combine,
    expert_combine_backward,
)
from taskloom.triton_kernels.gating.expert_sort import (
    expert_sort,
)
from taskloom.triton_kernels.gating.lora_feature_gate import (
    lora_feature_gate,
    lora_feature_gate_backward,
)
from taskloom.triton_kernels.gating.manifold_loss import (
    manifold_loss,
    manifold_loss_backward,
)
from taskloom.triton_kernels.gating.multi_gate import (
    multi_gate_combine,
    multi_gate_combine_backward,
)
from taskloom.triton_kernels.gating.stream_softmax import (
    stream_softmax_mix,
    stream_softmax_mix_backward,
)
from taskloom.triton_kernels.gating.topk_gate import (
    topk_gate,
)
from taskloom.triton_kernels.gating.topk_gate_backward import (
    topk_gate_backward,
)

__all__ = [
    "batch_norm_silu",
    "batch_norm_silu_backward",
    "expert_combine",
    "expert_combine_backward",
    "expert_sort",
    "lora_feature_gate",
    "lora_feature_gate_backward",
    "manifold_loss",
    "manifold_loss_backward",
    "multi_gate_combine",
    "multi_gate_combine_backward",
    "stream_softmax_mix",
    "stream_softmax_mix_backward",
    "topk_gate",
    "topk_gate_backward",
]

"""Launchers of the gating family's Triton kernels, with the arguments of the ops of the same names in ``torch.ops.taskloom``."""

from __future__ import annotations

from taskloom.triton_kernels.gating.topk_gate import topk_gate
from taskloom.triton_kernels.gating.topk_gate_backward import topk_gate_backward

__all__ = ["topk_gate", "topk_gate_backward"]

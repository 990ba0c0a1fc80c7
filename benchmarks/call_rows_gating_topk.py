"""What one call of topk_gate and of its backward costs on a few logits, beside the router in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import taskloom
from taskloom.ops.gating import topk_gate_backward

LIMIT = 4.0

Call = Callable[[], Any]


def _router(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weight, ids = logits.softmax(-1).topk(2, dim=-1)
    return weight / weight.sum(-1, keepdim=True), ids


def calls() -> list[tuple[str, Call, Call, str, Call | None]]:
    """Op, ours, peer, the peer's name and the native op alone."""
    ops = torch.ops.taskloom
    logits, slopes = torch.randn(2, 8), torch.randn(2, 2)
    gate = taskloom.topk_gate(logits, 2, renormalize=True)
    leaf = logits.clone().requires_grad_()
    weight = _router(leaf)[0]
    forward = (logits, None, 2, "softmax", 1, 1, "max", -torch.inf, True, 1.0, 0.0, 1.0, False, False)
    backward = (logits, gate.ids, gate.weight, slopes, None, None, "softmax", True, 1.0, 0.0, 1.0)
    return [
        (
            "topk_gate",
            lambda: taskloom.topk_gate(logits, 2, renormalize=True),
            lambda: _router(logits),
            "softmax, topk, division",
            lambda: ops.topk_gate.default(*forward),
        ),
        (
            "topk_gate_backward",
            lambda: topk_gate_backward(logits, gate.ids, gate.weight, slopes, renormalize=True),
            lambda: torch.autograd.grad(weight, leaf, slopes, retain_graph=True),
            "backward of softmax, topk, division",
            lambda: ops.topk_gate_backward.default(*backward),
        ),
    ]

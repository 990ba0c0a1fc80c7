"""The routers that people use, in plain torch: what topk_gate is compared with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

CHOSEN = 8
GROUPS, KEPT_GROUPS = 8, 4
DEEPSEEK: dict[str, Any] = {
    "score": "sigmoid",
    "n_group": GROUPS,
    "topk_group": KEPT_GROUPS,
    "renormalize": True,
    "eps": 1e-20,
    "scale": 2.5,
}
Routed = tuple[Tensor, Tensor]


def softmax_router(logits: Tensor) -> Routed:
    """Qwen3-MoE's: softmax in float32, the best, renormalised; weights and experts."""
    weight, ids = torch.topk(logits.softmax(-1, dtype=torch.float32), CHOSEN, dim=-1)
    return weight / weight.sum(-1, keepdim=True), ids


def plain_softmax_router(logits: Tensor) -> Routed:
    """OLMoE's: the same, not renormalised."""
    return torch.topk(logits.softmax(-1, dtype=torch.float32), CHOSEN, dim=-1)


def deepseek_router(logits: Tensor, bias: Tensor) -> Routed:
    """DeepSeek-V3's: sigmoids, a bias for the choice, the best groups by their two best, renormalised and scaled."""
    scores = logits.float().sigmoid()
    choice = scores + bias
    tokens, experts = choice.shape
    best = choice.view(tokens, GROUPS, -1).topk(2, dim=-1).values.sum(-1).topk(KEPT_GROUPS, dim=-1, sorted=False).indices
    kept = torch.zeros(tokens, GROUPS, device=logits.device).scatter_(1, best, 1)
    mask = kept[..., None].expand(-1, -1, experts // GROUPS).reshape(tokens, experts).bool()
    ids = choice.masked_fill(~mask, -math.inf).topk(CHOSEN, dim=-1).indices
    weight = scores.gather(1, ids)
    return weight / (weight.sum(-1, keepdim=True) + 1e-20) * 2.5, ids

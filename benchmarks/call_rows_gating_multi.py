"""What one call of the gates over one pool of experts, and of the softmax mix, costs on tensors of a few entries, beside eager torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import taskloom
from taskloom.ops.gating import multi_gate_combine_backward, stream_softmax_mix_backward

# A call looks at five tensors' shapes, and at the mask.
LIMIT = 4.0

Call = Callable[[], Any]


def calls() -> list[tuple[str, Call, Call, str, Call | None]]:
    """Op, ours, peer, the peer's name and the native op alone."""
    ops = torch.ops.taskloom
    logits, z, mask = torch.randn(2, 2, 3), torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, False, True]])
    gradient = torch.randn(2, 2, 4)
    tracked = [one.clone().requires_grad_() for one in (logits, z)]
    out = torch.softmax(tracked[0].masked_fill(~mask, -torch.inf), -1) @ tracked[1]
    x, y, experts = torch.randn(2, 3, 2), torch.randn(2, 3), torch.randn(5, 2)
    followed = [one.clone().requires_grad_() for one in (x, y, experts)]

    def mix(x: torch.Tensor, y: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        predictions = x @ experts.T
        squares = (y[..., None] - predictions).square()
        return (torch.softmax((squares - squares.cumsum(1)) * 2, -1) * predictions).sum(-1)

    pred, lse = taskloom.stream_softmax_mix(x, y, experts, 0.5)
    mixed = mix(*followed)
    given = (y, None, x, y, experts, pred, lse, 0.5)
    return [
        (
            "multi_gate_combine",
            lambda: taskloom.multi_gate_combine(logits, z, mask),
            lambda: torch.softmax(logits.masked_fill(~mask, -torch.inf), -1) @ z,
            "masked softmax, bmm",
            lambda: ops.multi_gate_combine.default(logits, z, mask, "softmax", None, None),
        ),
        (
            "multi_gate_combine_backward",
            lambda: multi_gate_combine_backward(gradient, logits, z, mask),
            lambda: torch.autograd.grad(out, tracked, gradient, retain_graph=True),
            "backward of masked softmax, bmm",
            lambda: ops.multi_gate_combine_backward.default(gradient, None, logits, z, mask, "softmax", None, None, True, True, True),
        ),
        (
            "stream_softmax_mix",
            lambda: taskloom.stream_softmax_mix(x, y, experts, 0.5),
            lambda: mix(x, y, experts),
            "[B, K, M] in memory",
            lambda: ops.stream_softmax_mix.default(x, y, experts, 0.5),
        ),
        (
            "stream_softmax_mix_backward",
            lambda: stream_softmax_mix_backward(*given),
            lambda: torch.autograd.grad(mixed, followed, y, retain_graph=True),
            "backward of [B, K, M] in memory",
            None,
        ),
    ]

"""What one call of each expert op, and of manifold_loss, costs on tensors of a few entries, beside what torch has for the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import taskloom
from taskloom.ops.gating import expert_combine_backward, manifold_loss_backward

# The peers are several calls of torch's, and ours one that checks its indices.
LIMIT = 2.0

Call = Callable[[], Any]


def calls() -> list[tuple[str, Call, Call, str, Call | None]]:
    """Op, ours, peer, the peer's name and the native op alone."""
    ops = torch.ops.taskloom
    ids = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32)
    y, weight, slopes = torch.randn(4, 3), torch.rand(2, 2), torch.randn(2, 3)
    inverse = taskloom.expert_sort(ids, 3).inverse
    rows = inverse.long()
    r, table, known, slope = torch.rand(2, 4), torch.rand(5, 4), torch.tensor([[0, 1], [4, 2]]), torch.rand(2)
    tracked_y, tracked_weight, tracked_r = (one.clone().requires_grad_() for one in (y, weight, r))
    combined = (tracked_weight[..., None] * tracked_y[rows]).sum(1)
    loss = (weight * (tracked_r[:, None] - table[known]).square().sum(-1)).sum(-1)

    def sort() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        flat = ids.reshape(-1)
        order = torch.sort(flat, stable=True).indices
        return order, torch.argsort(order), torch.bincount(flat, minlength=3).cumsum(0)

    return [
        (
            "expert_sort",
            lambda: taskloom.expert_sort(ids, 3)[:3],
            sort,
            "sort, argsort, bincount, cumsum",
            lambda: ops.expert_sort.default(ids, 3, 0)[:3],
        ),
        (
            "expert_combine",
            lambda: taskloom.expert_combine(y, weight, inverse),
            lambda: (weight[..., None] * y[rows]).sum(1),
            "gather, multiply, sum",
            lambda: ops.expert_combine.default(y, weight, inverse),
        ),
        (
            "expert_combine_backward",
            lambda: expert_combine_backward(slopes, y, weight, inverse),
            lambda: torch.autograd.grad(combined, (tracked_y, tracked_weight), slopes, retain_graph=True),
            "backward of gather, multiply, sum",
            lambda: ops.expert_combine_backward.default(slopes, y, weight, inverse, True, True),
        ),
        (
            "manifold_loss",
            lambda: taskloom.manifold_loss(r, table, known, weight),
            lambda: (weight * (r[:, None] - table[known]).square().sum(-1)).sum(-1),
            "gather, subtract, square, sum",
            lambda: ops.manifold_loss.default(r, table, known, weight),
        ),
        (
            "manifold_loss_backward",
            lambda: manifold_loss_backward(slope, r, table, known, weight),
            lambda: torch.autograd.grad(loss, tracked_r, slope, retain_graph=True),
            "backward of gather, subtract, square, sum",
            lambda: ops.manifold_loss_backward.default(slope, r, table, known, weight),
        ),
    ]

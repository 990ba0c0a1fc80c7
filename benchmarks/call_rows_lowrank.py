"""What one call of each op of the lowrank family costs on matrices of a few entries, beside torch's own products of the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import taskloom
from taskloom.ops.lowrank import lowrank_apply_backward, lowrank_merge_backward

# A call takes two factors, a weight and more: it is held against the two or three products that it stands for.
LIMIT = 4.0

Call = Callable[[], Any]


def calls() -> list[tuple[str, Call, Call, str, Call | None]]:
    """Op, ours, peer, the peer's name and the native op alone."""
    ops = torch.ops.taskloom
    base, a, b, weight = torch.randn(4, 6), torch.randn(2, 6), torch.randn(4, 2), torch.ones(1)
    target, x, gradient = base.clone(), torch.randn(3, 6), torch.randn(3, 4)
    A, B, weights, task = a[None].repeat(2, 1, 1), b[None].repeat(2, 1, 1), torch.ones(2), torch.tensor([1, 0, -1])
    needed = [True, True, True, False]
    rows, columns, one = torch.randn(1, 6, 2), torch.randn(1, 4, 2), torch.ones(1)
    return [
        (
            "kernel_merge_out",
            lambda: taskloom.kernel_merge(rows, columns, one, kernel="pwl", gate=None, base=base, out=target),
            lambda: torch.add(base, torch.cdist(columns, rows)[0], out=target),
            "cdist and add",
            None,
        ),
        (
            "lowrank_merge",
            lambda: taskloom.lowrank_merge(base, a, b),
            lambda: torch.addmm(base, b, a),
            "addmm",
            lambda: ops.lowrank_merge.default(base, [a], [b], weight, None),
        ),
        ("lowrank_merge_", lambda: taskloom.lowrank_merge_(target, a, b, 0.0), lambda: base.addmm_(b, a, alpha=0.0), "addmm_", None),
        (
            "lowrank_merge_tasks",
            lambda: taskloom.lowrank_merge_tasks(base, A, B),
            lambda: torch.baddbmm(base.expand(2, 4, 6), B, A),
            "baddbmm",
            lambda: ops.lowrank_merge_tasks.default(base, A, B, weights),
        ),
        (
            "lowrank_merge_backward",
            lambda: lowrank_merge_backward(base, None, [a], [b], weight),
            lambda: (b.T @ base, base @ a.T),
            "two products",
            lambda: ops.lowrank_merge_backward.default(base, None, [a], [b], weight, None, needed),
        ),
        (
            "lowrank_norm",
            lambda: taskloom.lowrank_norm(base, a, b),
            lambda: torch.linalg.norm(torch.addmm(base, b, a), dim=1),
            "norm of addmm",
            lambda: ops.lowrank_norm.default(base, [a], [b], weight),
        ),
        (
            "lowrank_apply",
            lambda: taskloom.lowrank_apply(x, A, B, 1.0, task),
            lambda: ((x[:2] @ a.T) @ b.T, (x[2:] @ a.T) @ b.T),
            "two products for each task",
            lambda: ops.lowrank_apply.default(x, A, B, weights, task, None),
        ),
        (
            "lowrank_apply_backward",
            lambda: lowrank_apply_backward(gradient, x, A, B, weights, task),
            lambda: [(gradient @ b, gradient @ b @ a, (gradient @ b).T @ x, gradient.T @ (x @ a.T)) for _ in range(2)],
            "the products of each task",
            lambda: ops.lowrank_apply_backward.default(gradient, x, A, B, weights, task, [True] * 4),
        ),
    ]

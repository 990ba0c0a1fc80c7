"""Rows of lowrank_apply and its backward: a batch whose rows take one of 16 adapters each."""

from __future__ import annotations

import torch
from torch import Tensor

import taskloom
from harness import Contest, Row, Shape
from inputs import total_bytes, weights
from taskloom.ops.lowrank import lowrank_apply_backward

RANK, TASKS, BATCH = 16, 16, 256


def _inputs(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, A, B, the task of each row, and a gradient."""
    rows, columns = shape
    A = torch.stack([weights((RANK, columns), 100 + place, dtype) for place in range(TASKS)])
    B = torch.stack([weights((rows, RANK), 200 + place, dtype) for place in range(TASKS)])
    task = torch.randint(0, TASKS, (BATCH,), generator=torch.Generator().manual_seed(0))
    return weights((BATCH, columns), 1, dtype), A, B, task, weights((BATCH, rows), 2, dtype)


def apply_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    x, A, B, task, _ = _inputs(shape, dtype)

    def by_loop() -> Tensor:
        y = torch.zeros(BATCH, B.shape[1])
        for t in range(TASKS):
            chosen = (task == t).nonzero().squeeze(1)
            y[chosen] = x[chosen].float() @ A[t].float().T @ B[t].float().T
        return y.to(dtype)

    def by_gathering() -> Tensor:
        inner = torch.bmm(A[task].float(), x.float()[:, :, None])
        return torch.bmm(B[task].float(), inner)[:, :, 0].to(dtype)

    # The base's product is torch's own in every way of doing it, and left out.
    return Contest(
        ours=lambda: taskloom.lowrank_apply(x, A, B, 1.0, task),
        bytes=total_bytes(x, A, B, task) + BATCH * B.shape[1] * x.itemsize,
        peers={"a loop over tasks": by_loop, "gathered factors": by_gathering},
        sizes={"rank": RANK, "tasks": TASKS, "rows": BATCH},
    )


def backward_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    x, A, B, task, gradient = _inputs(shape, dtype)
    weight = torch.ones(TASKS)

    def by_gathering() -> list[Tensor]:
        a, b = A[task].float(), B[task].float()
        back, inner = torch.einsum("no,nor->nr", gradient.float(), b), torch.einsum("ni,nri->nr", x.float(), a)
        for_x = torch.einsum("nr,nri->ni", back, a)
        for_a = torch.zeros(A.shape).index_add_(0, task, back[:, :, None] * x.float()[:, None])
        for_b = torch.zeros(B.shape).index_add_(0, task, gradient.float()[:, :, None] * inner[:, None])
        return [for_x.to(dtype), for_a.to(dtype), for_b.to(dtype)]

    return Contest(
        ours=lambda: lowrank_apply_backward(gradient, x, A, B, weight, task, (True, True, True, False)),
        bytes=2 * total_bytes(x, A, B) + total_bytes(gradient, task),
        peers={"gathered factors": by_gathering},
        sizes={"rank": RANK, "tasks": TASKS, "rows": BATCH},
    )


ROWS = (
    Row("lowrank_apply", apply_contest, f"{TASKS} tasks, {BATCH} rows", memory=True),
    Row("lowrank_apply_backward", backward_contest, f"{TASKS} tasks, {BATCH} rows", memory=True),
)

"""Rows of RoMA's manifold loss: three neighbours in a table of eight times as many routing vectors."""

from __future__ import annotations

import torch
from torch import Tensor

import taskloom
from harness import Contest, Row, Shape
from inputs import total_bytes, weights
from taskloom.ops.gating import manifold_loss_backward

NEIGHBOURS, LAYERS = 3, 5
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def _inputs(shape: Shape, dtype: torch.dtype) -> Inputs:
    """Vectors of five layers' probabilities, a table of them in ``dtype``, neighbours and their weights."""
    rows, width = shape[0], LAYERS * (shape[1] // 16)
    r, table = (weights((count, width), seed).softmax(-1) for seed, count in enumerate((rows, 8 * rows)))
    ids = torch.randint(8 * rows, (rows, NEIGHBOURS), generator=torch.Generator().manual_seed(2))
    return r, table.to(dtype), ids, weights((rows, NEIGHBOURS), 3).softmax(-1)


def _eager(r: Tensor, table: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    return (weight * (r[:, None] - table[ids].float()).square().sum(-1)).sum(-1)


def _named_bytes(r: Tensor, table: Tensor) -> int:
    return NEIGHBOURS * r.numel() * table.element_size()


def loss_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    given = r, table, ids, weight = _inputs(shape, dtype)
    return Contest(
        ours=lambda: taskloom.manifold_loss(*given),
        bytes=_named_bytes(r, table) + total_bytes(r, ids, weight),
        peers={"gather, subtract, square, sum": lambda: _eager(*given)},
        sizes={"rows": len(r), "width": r.shape[1], "table": len(table), "neighbours": NEIGHBOURS},
    )


def backward_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    given = r, table, ids, weight = _inputs(shape, dtype)
    leaf, gradient = r.clone().requires_grad_(), weights((len(r),), 4)
    loss = _eager(leaf, table, ids, weight)
    return Contest(
        ours=lambda: manifold_loss_backward(gradient, *given),
        bytes=_named_bytes(r, table) + total_bytes(r, r, ids, weight, gradient),
        peers={"backward of gather, subtract, square, sum": lambda: torch.autograd.grad(loss, leaf, gradient, retain_graph=True)[0]},
        sizes={"rows": len(r), "width": r.shape[1], "table": len(table), "neighbours": NEIGHBOURS},
    )


ROWS = (
    Row("manifold_loss", loss_contest, "3 neighbours", dtypes=(torch.float32, torch.float16), memory=True),
    Row("manifold_loss_backward", backward_contest, "3 neighbours", dtypes=(torch.float32, torch.float16), memory=True),
)

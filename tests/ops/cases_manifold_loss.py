"""Contracts of manifold_loss and its backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from contract import Case, Contract
from samples import normal
from torch import Tensor

import taskloom
from taskloom.ops import gating

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def neighbours(
    rows: int,
    width: int,
    known: int,
    k: int,
    r_dtype: torch.dtype = torch.float32,
    table_dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype = torch.float32,
    ids_dtype: torch.dtype = torch.int64,
) -> Inputs:
    """Routing vectors, a table of them, and each row's neighbours in it with their weights."""
    ids = torch.randint(0, known, (rows, k), generator=torch.Generator().manual_seed(3)).to(ids_dtype)
    table = normal(known, width, seed=1).softmax(-1).to(table_dtype)
    return normal(rows, width).softmax(-1).to(r_dtype), table, ids, normal(rows, k, seed=2).softmax(-1).to(weight_dtype)


def _inputs() -> Iterator[tuple[str, Inputs]]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        yield f"{dtype}", neighbours(7, 45, 11, 3, dtype, dtype, dtype)
    for dtype in (torch.bfloat16, torch.float16):
        yield f"table of {dtype}", neighbours(7, 320, 11, 3, table_dtype=dtype, ids_dtype=torch.int32)
    yield "wide weights", neighbours(5, 16, 4, 2, weight_dtype=torch.float64)
    yield "one neighbour", neighbours(6, 8, 3, 1)
    yield "long rows", neighbours(3, 2500, 5, 2, table_dtype=torch.float16)
    yield "many rows", neighbours(300, 40, 50, 3)
    r, table, ids, weight = neighbours(6, 12, 5, 3)
    ids[1], weight[2], ids[3, 1], weight[4, 0] = -1, 0, -1, 0
    yield "rows without neighbours", (r, table, ids, weight)
    table, weight = table.clone(), weight.clone()
    table[4] = torch.nan
    weight[ids == 4] = 0
    weight[0, 2] = torch.nan
    ids[0, 2] = -1
    yield "what is no neighbour is not finite", (r, table, ids, weight)
    yield "no table", (r, table[:0], torch.full((6, 2), -1), weight[:, :2])
    yield (
        "strided",
        (
            normal(12, 6).t(),
            normal(12, 10, seed=1).t()[::2],
            torch.tensor([[0, 1, 2, 3, 4, 4]]).expand(6, 6)[:, ::2],
            weight.t().contiguous().t(),
        ),
    )
    yield "no rows", (r[:0], table, ids[:0], weight[:0])
    yield "no neighbours", (r, table, ids[:, :0], weight[:, :0])
    yield "no entries", (r[:, :0], table[:, :0], ids, weight)


def loss_cases() -> Iterator[Case]:
    for name, inputs in _inputs():
        yield Case(name, inputs)
    r, table, ids, weight = neighbours(6, 12, 5, 3)
    yield Case("gradient", (r.requires_grad_(), table, ids, weight))


def backward_cases() -> Iterator[Case]:
    for name, (r, table, ids, weight) in _inputs():
        yield Case(name, (normal(len(r), seed=5), r, table, ids, weight))
    yield Case("one slope for all", (torch.ones(()).expand(7), *neighbours(7, 20, 4, 2)))


CONTRACTS = (
    Contract("manifold_loss", taskloom.manifold_loss, loss_cases),
    Contract("manifold_loss_backward", gating.manifold_loss_backward, backward_cases),
)

"""A linear map with low-rank adapters beside it, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype, without_autocast


def _shares(rows: int, weight: Tensor, task: Tensor | None, tasks: int) -> Tensor:
    """The factor of each adapter in each row, [N, T]."""
    share = weight.expand(rows, -1)
    if task is None:
        return share
    return share * torch.nn.functional.one_hot(task.clamp(min=0).long(), tasks) * (task >= 0)[:, None]


@without_autocast
def lowrank_apply(
    x: Tensor, A: Tensor, B: Tensor, weight: Tensor, task: Tensor | None = None, base: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Y = x base^T + bias + adapter(x), rounded once to x's dtype.

    x [N, in], A [T, r, in], B [T, out, r], weight [T]. With ``task`` [N] a row takes adapter task[row] (none where it is negative);
    without, every row takes the sum of all adapters. base [out, in] and bias [out] may be missing.
    """
    dtype = accumulation_dtype(x, A, B, weight, base, bias)
    rows = x.to(dtype)
    inner = torch.einsum("ni,tri->ntr", rows, A.to(dtype))
    y = torch.einsum("ntr,tor,nt->no", inner, B.to(dtype), _shares(len(x), weight.to(dtype), task, len(A)))
    if base is not None:
        y = y + rows @ base.to(dtype).T
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype)


@without_autocast
def lowrank_apply_backward(
    gradient: Tensor, x: Tensor, A: Tensor, B: Tensor, weight: Tensor, task: Tensor | None, needed: Sequence[bool]
) -> list[Tensor]:
    """Gradients of x (of the adapters' part), A, B and weight, of each where ``needed`` says so."""
    dtype = accumulation_dtype(gradient, x, A, B, weight)
    g, rows, a, b = gradient.to(dtype), x.to(dtype), A.to(dtype), B.to(dtype)
    share = _shares(len(x), weight.to(dtype), task, len(A))
    inner, back = torch.einsum("ni,tri->ntr", rows, a), torch.einsum("no,tor->ntr", g, b)
    products = torch.einsum("ntr,ntr->nt", inner, back) * _shares(len(x), torch.ones_like(weight, dtype=dtype), task, len(A))
    found = (
        torch.einsum("ntr,tri,nt->ni", back, a, share).to(x.dtype),
        torch.einsum("ntr,ni,nt->tri", back, rows, share).to(A.dtype),
        torch.einsum("ntr,no,nt->tor", inner, g, share).to(B.dtype),
        products.sum(0).to(weight.dtype),
    )
    return [one for one, wanted in zip(found, needed, strict=True) if wanted]

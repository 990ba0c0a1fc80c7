"""A linear map with low-rank adapters beside it, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype


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
    share = weight.to(dtype).expand(len(x), -1)
    if task is not None:
        share = share * torch.nn.functional.one_hot(task.clamp(min=0).long(), len(A)) * (task >= 0)[:, None]
    y = torch.einsum("ntr,tor,nt->no", inner, B.to(dtype), share)
    if base is not None:
        y = y + rows @ base.to(dtype).T
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype)

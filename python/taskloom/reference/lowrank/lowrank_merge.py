"""Products of thin factors added to a weight, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype, without_autocast


def _sum(base: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Base + sum_i weight[i] * B[i] A[i], not rounded yet."""
    total = torch.zeros(base.shape, dtype=dtype, device=base.device)
    for share, a, b in zip(weight.to(dtype), A, B, strict=True):
        total = total + (share * b.to(dtype)) @ a.to(dtype)
    return base.to(dtype) + total


@without_autocast
def lowrank_merge(base: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], weight: Tensor, row_scale: Tensor | None = None) -> Tensor:
    """Round row_scale * (base + sum_i weight[i] * B[i] A[i]) once to base's dtype.

    base [out, in], A[i] [r_i, in], B[i] [out, r_i], weight [n], row_scale [out] or None for ones.
    """
    dtype = accumulation_dtype(base, weight, row_scale, *A, *B)
    total = _sum(base, A, B, weight, dtype)
    return (total if row_scale is None else row_scale.to(dtype)[:, None] * total).to(base.dtype)


@without_autocast
def lowrank_merge_(
    target: Tensor, base: Tensor | None, A: Sequence[Tensor], B: Sequence[Tensor], weight: Tensor, row_scale: Tensor | None = None
) -> Tensor:
    """The merge of base, or of what target holds, written to target and rounded once to its dtype."""
    start = target if base is None else base
    dtype = accumulation_dtype(start, weight, row_scale, *A, *B)
    return target.copy_(lowrank_merge(start.to(dtype), A, B, weight, row_scale))


@without_autocast
def lowrank_merge_backward(
    gradient: Tensor,
    base: Tensor | None,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    weight: Tensor,
    row_scale: Tensor | None,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the A[i], the B[i], weight and row_scale, of each of these four where ``needed`` says so."""
    dtype = accumulation_dtype(gradient, base, weight, row_scale, *A, *B)
    plain = gradient.to(dtype)
    scaled = plain if row_scale is None else row_scale.to(dtype)[:, None] * plain
    shares = weight.to(dtype)
    wide = [(a.to(dtype), b.to(dtype)) for a, b in zip(A, B, strict=True)]
    found = []
    if needed[0]:
        found += [(share * (b.T @ scaled)).to(like.dtype) for share, (_, b), like in zip(shares, wide, A, strict=True)]
    if needed[1]:
        found += [(share * (scaled @ a.T)).to(like.dtype) for share, (a, _), like in zip(shares, wide, B, strict=True)]
    if needed[2]:
        products = [(scaled * (b @ a)).sum() for a, b in wide]
        found.append(torch.stack(products).to(weight.dtype) if products else torch.zeros_like(weight))
    if needed[3]:
        assert base is not None
        assert row_scale is not None
        found.append((plain * _sum(base, A, B, weight, dtype)).sum(1).to(row_scale.dtype))
    return found


def lowrank_merge_tasks(base: Tensor, A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    """The merge with each adapter alone: [T, out, in] of base [out, in], A [T, r, in], B [T, out, r], weight [T]."""
    if len(A) == 0:
        return base.new_empty(0, *base.shape)
    return torch.stack([lowrank_merge(base, [A[t]], [B[t]], weight[t : t + 1]) for t in range(len(A))])


@without_autocast
def lowrank_norm(base: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], weight: Tensor) -> Tensor:
    """The 2-norm of each row of base + sum_i weight[i] * B[i] A[i], in the dtype of the arithmetic; squares are summed in float64."""
    dtype = accumulation_dtype(base, weight, *A, *B)
    norm: Tensor = torch.linalg.vector_norm(_sum(base, A, B, weight, dtype).double(), dim=1)
    return norm.to(dtype)


def dora_merge(base: Tensor, A: Tensor, B: Tensor, weight: Tensor, magnitude: Tensor) -> Tensor:
    """Rows of base + weight * B A scaled to the norms in ``magnitude`` [out], rounded once; ``weight`` is [1].

    The norm of what is scaled is a constant to autograd.
    """
    dtype = accumulation_dtype(base, weight, magnitude, A, B)
    norm = lowrank_norm(base.detach(), [A.detach()], [B.detach()], weight.detach()).to(dtype)
    return lowrank_merge(base, [A], [B], weight, magnitude.to(dtype) / norm)

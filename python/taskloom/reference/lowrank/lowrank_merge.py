"""Products of thin factors added to a weight, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype


def lowrank_merge(base: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Round base + sum_i weight[i] * B[i] A[i] once to base's dtype; base [out, in], A[i] [r_i, in], B[i] [out, r_i], weight [n]."""
    dtype = accumulation_dtype(base, weight, *A, *B)
    total = base.to(dtype)
    for share, a, b in zip(weight.to(dtype), A, B, strict=True):
        total = total + share * (b.to(dtype) @ a.to(dtype))
    return total.to(base.dtype)


def lowrank_merge_tasks(base: Tensor, A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    """The merge with each adapter alone: [T, out, in] of base [out, in], A [T, r, in], B [T, out, r], weight [T]."""
    return torch.stack([lowrank_merge(base, [A[t]], [B[t]], weight[t : t + 1]) for t in range(len(A))])


def dora_merge(base: Tensor, A: Tensor, B: Tensor, weight: Tensor, magnitude: Tensor) -> Tensor:
    """Rows of base + weight * B A scaled to the norms in ``magnitude`` [out], rounded once; ``weight`` has no dimension."""
    dtype = accumulation_dtype(base, weight, magnitude, A, B)
    merged = base.to(dtype) + weight.to(dtype) * (B.to(dtype) @ A.to(dtype))
    norm: Tensor = torch.linalg.vector_norm(merged, dim=1, keepdim=True)
    scaled: Tensor = magnitude.to(dtype)[:, None] * merged / norm
    return scaled.to(base.dtype)

"""A sum of deltas with one coefficient per task and block, or group of a block, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype


def block_scale_merge(
    base: Sequence[Tensor], deltas: Sequence[Sequence[Tensor]], coef: Tensor, partition: Sequence[Tensor]
) -> list[Tensor]:
    """Block b is base[b] + sum_t coef[t, b, partition[b]] * deltas[t][b]; without a partition all entries are in group 0."""
    merged = []
    for b, block in enumerate(base):
        dtype = accumulation_dtype(block, coef, *(task[b] for task in deltas))
        total = torch.zeros(block.shape, dtype=dtype, device=block.device)
        for t, task in enumerate(deltas):
            factors = coef[t, b].to(dtype)
            factor = factors[partition[b].long()] if partition else factors[0]
            total = total + factor * task[b].to(dtype)
        merged.append((block.to(dtype) + total).to(block.dtype))
    return merged


def block_scale_merge_backward(
    gradients: Sequence[Tensor], deltas: Sequence[Sequence[Tensor]], partition: Sequence[Tensor], groups: int
) -> Tensor:
    """The inner products of gradients[b] and deltas[t][b] over each group, in float64: shape [T, m, groups]."""
    products = torch.zeros(len(deltas), len(gradients), groups, dtype=torch.float64, device=gradients[0].device)
    for t, task in enumerate(deltas):
        for b, gradient in enumerate(gradients):
            product = (gradient.double() * task[b].double()).reshape(-1)
            group = partition[b].reshape(-1).long() if partition else torch.zeros_like(product, dtype=torch.int64)
            products[t, b].index_add_(0, group, product)
    return products

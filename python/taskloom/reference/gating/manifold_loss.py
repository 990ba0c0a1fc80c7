"""Weighed squared distances of rows to their neighbours in a table, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype


def _differences(r: Tensor, reference: Tensor, ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Each row less its neighbours, and their weights; both 0 for what is no neighbour."""
    dtype = accumulation_dtype(r, reference, weight)
    present = (ids >= 0) & (weight != 0)
    # Of a table without rows there is nothing to choose; a row of zeros after the last stands for no neighbour.
    rows = torch.cat([reference, reference.new_zeros(1, reference.shape[1])])[torch.where(present, ids, -1).long()]
    differences = torch.where(present[..., None], r.to(dtype)[:, None] - rows.to(dtype), 0)
    return differences, torch.where(present, weight.to(dtype), 0)


def manifold_loss(r: Tensor, reference: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """``sum_j weight_j |r - reference[ids_j]|^2`` for each row of r [B, R]; an id of -1 or a weight of 0 is no neighbour."""
    differences, weights = _differences(r, reference, ids, weight)
    return (weights * differences.square().sum(-1)).sum(-1)


def manifold_loss_backward(gradient: Tensor, r: Tensor, reference: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
    """The gradient of r."""
    differences, weights = _differences(r, reference, ids, weight)
    pulled = (weights[..., None] * differences).sum(1)
    return (2 * gradient.to(pulled.dtype)[:, None] * pulled).to(r.dtype)

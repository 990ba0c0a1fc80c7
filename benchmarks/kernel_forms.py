"""The official form of SNELLA's merge in torch eager: cdist, softmax, quantile, gate; each step makes a matrix of the weight's size."""

from __future__ import annotations

import torch
from torch import Tensor

QUANTILE_TAKES = 1 << 24


def quantile(magnitudes: Tensor, sparsity: float) -> Tensor:
    """torch.quantile, or where that refuses so many values the order statistic below it by kthvalue."""
    flat = magnitudes.flatten()
    if flat.numel() <= QUANTILE_TAKES:
        return torch.quantile(flat, sparsity)
    return flat.kthvalue(1 + int(sparsity * (flat.numel() - 1))).values


def entries(A: Tensor, B: Tensor, coef: Tensor, numbers: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The entries of mixk, [n, m]."""
    alpha, gamma, beta = numbers
    distances = torch.cdist(A, B, compute_mode="donot_use_mm_for_euclid_dist")
    mixed = (coef[:, None, None] * distances).sum(0)
    return mixed + alpha * torch.softmax(mixed / gamma, 1) + beta


def gated(A: Tensor, B: Tensor, coef: Tensor, numbers: tuple[Tensor, Tensor, Tensor], sparsity: float) -> Tensor:
    """The entries that the gate keeps, [n, m]; its factor is a constant to autograd."""
    values = entries(A, B, coef, numbers)
    magnitudes = values.detach().abs()
    return values * torch.where(magnitudes > quantile(magnitudes, sparsity), magnitudes, 0)


def merged(base: Tensor, A: Tensor, B: Tensor, coef: Tensor, numbers: tuple[Tensor, Tensor, Tensor], sparsity: float) -> Tensor:
    """Base + the gated entries, transposed."""
    return base + gated(A, B, coef, numbers, sparsity).T

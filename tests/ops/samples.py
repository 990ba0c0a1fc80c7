"""Seeded tensors that the cases of several ops share."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def checkpoints(*shape: int, tasks: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A base and tuned tensors near it."""
    base = normal(*shape, seed=seed)
    tuned = [(base + 0.1 * normal(*shape, seed=seed + 1 + task)).to(dtype) for task in range(tasks)]
    return base.to(dtype), tuned


def with_specials(*shape: int, seed: int = 0) -> Tensor:
    """Values with NaN, infinities, both zeros and ties among them."""
    values = (normal(*shape, seed=seed) * 4).round() / 4
    flat = values.view(-1)
    for offset, special in enumerate((torch.nan, torch.inf, -torch.inf, -0.0, -torch.nan)):
        flat[offset::11] = special
    return values

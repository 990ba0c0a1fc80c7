"""Seeded sample tensors that the cases of several ops share."""

from __future__ import annotations

import torch
from torch import Tensor

import taskloom


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


def weights(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    """Normal values, the same for every dtype up to rounding."""
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def moved(base: torch.Tensor, seed: int, density: float = 0.5, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A task's weights: base with a share of its entries changed a little."""
    changed = torch.rand(base.shape, generator=torch.Generator().manual_seed(seed)) < density
    step = weights(*base.shape, seed=seed + 1000, dtype=base.dtype, scale=0.1)
    return torch.where(changed, base + step, base).to(dtype or base.dtype)


def random_packed(numel: int, seed: int = 0, density: float = 0.3) -> torch.Tensor:
    """A packed mask."""
    return taskloom.pack_mask(torch.rand(numel, generator=torch.Generator().manual_seed(seed)) < density)


def set_tail(packed: torch.Tensor, numel: int) -> torch.Tensor:
    """The same mask with ones after its last entry."""
    full = packed.clone()
    if numel % 8:
        full[-1] |= 256 - (1 << (numel % 8))
    return full


def awkward(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """NaN, infinities, zeros of both signs, subnormals and the largest values, in 13 entries."""
    tiny, large = torch.finfo(dtype).smallest_normal / 4, torch.finfo(dtype).max
    values = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, tiny, -tiny, large, -large, 1.0, -1.0, 0.5, 3.0]
    return torch.tensor(values, dtype=torch.float64).to(dtype)

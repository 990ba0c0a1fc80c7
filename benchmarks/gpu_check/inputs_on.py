"""Seeded inputs, made on the device where they are used."""

from __future__ import annotations

import torch
from torch import Tensor

import taskloom


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def normal(device: torch.device, dtype: torch.dtype, entries: int, seed: int, scale: float = 1.0) -> Tensor:
    values = torch.randn(entries, generator=_generator(device, seed), device=device, dtype=dtype)
    return values.mul_(scale)


def checkpoints(device: torch.device, dtype: torch.dtype, entries: int, tasks: int) -> tuple[Tensor, list[Tensor]]:
    """A base and its tunings, whose deltas have a tenth of its standard deviation: bfloat16 holds them as differences."""
    base = normal(device, dtype, entries, 0)
    return base, [normal(device, dtype, entries, seed, 0.1).add_(base) for seed in range(1, tasks + 1)]


def bool_mask(device: torch.device, entries: int, seed: int, density: float) -> Tensor:
    return torch.rand(entries, generator=_generator(device, seed), device=device) < density


def packed_mask(device: torch.device, entries: int, seed: int, density: float) -> Tensor:
    with taskloom.backend("reference"):
        return taskloom.pack_mask(bool_mask(device, entries, seed, density))


def total_bytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)

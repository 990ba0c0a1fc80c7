"""Inputs of the op benchmarks, all made from seeds."""

from __future__ import annotations

import torch
from torch import Tensor

import taskloom
from harness import Shape


def weights(shape: Shape | tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def checkpoints(shape: Shape, dtype: torch.dtype, tasks: int) -> tuple[Tensor, list[Tensor]]:
    """A base and its tunings, whose deltas have a hundredth of its standard deviation."""
    base = weights(shape, 0)
    return base.to(dtype), [base.add(weights(shape, seed), alpha=0.01).to(dtype) for seed in range(1, tasks + 1)]


def bool_mask(shape: Shape, seed: int, density: float) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def packed_mask(shape: Shape, seed: int, density: float) -> Tensor:
    return taskloom.pack_mask(bool_mask(shape, seed, density))


def total_bytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)

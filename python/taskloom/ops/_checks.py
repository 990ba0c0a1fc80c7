"""Checks of arguments that the wrappers share. Each error names the op, the argument, what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """Raise TypeError unless ``tensor`` is a tensor of a dtype that the kernels compute with."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{op}: {name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_dtype(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise TypeError unless ``tensor`` is a tensor of ``dtype``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: {name}: expected {dtype}, got {tensor.dtype}")


def check_shape(op: str, name: str, tensor: Tensor, shape: torch.Size | tuple[int, ...], of: str) -> None:
    """Raise ValueError unless ``tensor`` has ``shape``, which is that of the argument ``of``."""
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{op}: {name}: expected shape {tuple(shape)} as {of}, got {tuple(tensor.shape)}")


def packed_bytes(numel: int) -> int:
    """Bytes of a bit-packed mask of ``numel`` entries."""
    return (numel + 7) // 8


def check_packed(op: str, name: str, packed: Tensor, numel: int) -> None:
    """Raise unless ``packed`` is a one-dimensional uint8 tensor of as many bytes as ``numel`` entries take."""
    check_dtype(op, name, packed, torch.uint8)
    if packed.dim() != 1 or packed.shape[0] != packed_bytes(numel):
        raise ValueError(
            f"{op}: {name}: expected shape ({packed_bytes(numel)},), one bit for each of {numel} entries, got {tuple(packed.shape)}"
        )

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


def check_untracked(op: str, twin: str | None, **tensors: Tensor) -> None:
    """Raise RuntimeError where autograd would have to follow an in-place op that it knows nothing of."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            other = f", or {twin} where gradients must flow" if twin else ""
            raise RuntimeError(f"{op}: {name} requires grad and the op is in place; use torch.no_grad(){other}")


def plain_number(op: str, name: str, value: float | Tensor) -> float:
    """``value`` as a float; raise TypeError where that would cut a gradient off."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise TypeError(f"{op}: {name}: expected a number, got a tensor that requires grad; the op has no gradient for it")
    return float(value)


def check_writable(op: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError where ``tensor`` repeats elements (as after expand), so that writing to it would mean nothing."""
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(f"{op}: {name}: expected a tensor that can be written to, got strides {tensor.stride()}, which repeat elements")


def mark_changed(tensor: Tensor) -> None:
    """Tell autograd that an op wrote to ``tensor``, so that a backward which needs the old values raises."""
    if not (torch.compiler.is_compiling() or tensor.is_inference()):
        torch.autograd.graph.increment_version(tensor)


def _has_memory(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type != "meta"


def _memory(tensor: Tensor) -> tuple[int, int]:
    """First and last address (exclusive) of the elements."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def check_apart(op: str, target: Tensor, **others: Tensor) -> None:
    """Raise ValueError where memory of ``target`` lies between the first and the last element of another argument."""
    if torch.compiler.is_compiling() or not all(map(_has_memory, (target, *others.values()))):
        return
    begin, end = _memory(target)
    for name, other in others.items():
        other_begin, other_end = _memory(other)
        if begin < other_end and other_begin < end:
            raise ValueError(f"{op}: target: must not share memory with {name}")

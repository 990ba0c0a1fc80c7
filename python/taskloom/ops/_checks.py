"""Checks of arguments that the wrappers share. Each error names the op, the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling

from taskloom.reference.arithmetic import autocast_dtype

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """Raise TypeError unless ``tensor`` is a tensor of a dtype that the kernels compute with."""
    if isinstance(tensor, Tensor) and tensor.dtype in FLOATING:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name}: expected a tensor, got {type(tensor).__name__}")
    raise TypeError(f"{op}: {name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}")


def cast_for_autocast(x: Tensor) -> Tensor:
    """The input as autocast would give it to a torch.nn.Linear."""
    dtype = autocast_dtype(x)
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)


def cast_layer_for_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same of a layer's tensors together; as they are where the input stays as it is."""
    dtype = autocast_dtype(x)
    if dtype is None or x.dtype == torch.float64:
        return x, weight, bias
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def check_floating_like(op: str, name: str, tensor: Tensor, like: Tensor, of: str) -> None:
    """Raise unless ``tensor`` has such a dtype and the shape of ``like``, which is the argument ``of``."""
    if isinstance(tensor, Tensor) and tensor.dtype in FLOATING and tensor.shape == like.shape:
        return
    check_floating(op, name, tensor)
    check_shape(op, name, tensor, like.shape, of)


def check_all_floating_like(op: str, name: str, tensors: Sequence[Tensor], like: Tensor, of: str) -> None:
    """The same of every tensor of a list; the place of one is spelt out for an error only."""
    shape = like.shape
    for place, tensor in enumerate(tensors):
        if not (isinstance(tensor, Tensor) and tensor.dtype in FLOATING and tensor.shape == shape):
            check_floating_like(op, f"{name}[{place}]", tensor, like, of)


def check_dtype(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise TypeError unless ``tensor`` is a tensor of ``dtype``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: {name}: expected {dtype}, got {tensor.dtype}")


def check_shape(op: str, name: str, tensor: Tensor, shape: torch.Size | tuple[int, ...], of: str) -> None:
    """Raise ValueError unless ``tensor`` has ``shape``, which is that of the argument ``of``."""
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name}: expected shape {tuple(shape)} as {of}, got {tuple(tensor.shape)}")


def packed_bytes(numel: int) -> int:
    """Bytes of a bit-packed mask of ``numel`` entries."""
    return (numel + 7) // 8


def check_packed(op: str, name: str, packed: Tensor, numel: int) -> None:
    """Raise unless ``packed`` is a one-dimensional uint8 tensor of as many bytes as ``numel`` entries take."""
    if isinstance(packed, Tensor) and packed.dtype == torch.uint8 and packed.shape == ((numel + 7) // 8,):
        return
    check_dtype(op, name, packed, torch.uint8)
    if packed.dim() != 1 or packed.shape[0] != packed_bytes(numel):
        raise ValueError(
            f"{op}: {name}: expected shape ({packed_bytes(numel)},), one bit for each of {numel} entries, got {tuple(packed.shape)}"
        )


def is_usual(like: Tensor, others: tuple[Tensor, ...], packed: tuple[Tensor, ...] = ()) -> bool:
    """Whether all are what nearly every call brings: floating point and of one shape, with masks packed for it.

    It asks in as few steps as Python can; where it says no, the checks by name say what is wrong, or that it is right all the same.
    """
    if not (isinstance(like, Tensor) and like.dtype in FLOATING):
        return False
    shape = like.shape
    for tensor in others:
        if not (isinstance(tensor, Tensor) and tensor.dtype in FLOATING and tensor.shape == shape):
            return False
    if packed:
        bits = ((like.numel() + 7) // 8,)
        for mask in packed:
            if not (isinstance(mask, Tensor) and mask.dtype == torch.uint8 and mask.shape == bits):
                return False
    return True


def check_untracked(op: str, twin: str | None, **tensors: Tensor) -> None:
    """Raise RuntimeError where autograd would have to follow an in-place op that it knows nothing of."""
    if not is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            other = f", or {twin} where gradients must flow" if twin else ""
            raise RuntimeError(f"{op}: {name} requires grad and the op is in place; use torch.no_grad(){other}")


def plain_number(op: str, name: str, value: float | Tensor) -> float:
    """``value`` as a float; raise TypeError where that would cut a gradient off."""
    if type(value) is float:
        return value
    if isinstance(value, Tensor) and value.requires_grad and is_grad_enabled():
        raise TypeError(f"{op}: {name}: expected a number, got a tensor that requires grad; the op has no gradient for it")
    given: object = value
    if given is None or isinstance(given, str):
        raise TypeError(f"{op}: {name}: expected a number, got {given!r}")
    return float(value)


def check_writable(op: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError where ``tensor`` repeats elements (as after expand), so that writing to it would mean nothing."""
    # A size that is not known yet must not decide anything while a graph is traced.
    if not is_compiling() and tensor.is_contiguous():
        return
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(f"{op}: {name}: expected a tensor that can be written to, got strides {tensor.stride()}, which repeat elements")


def mark_changed(tensor: Tensor) -> None:
    """Tell autograd that an op wrote to ``tensor``, so that a backward which needs the old values raises."""
    if not (is_compiling() or tensor.is_inference()):
        torch._C._increment_version((tensor,))


def _memory(tensor: Tensor) -> tuple[int, int]:
    """First and last address (exclusive) of the elements; nothing where there are none, or no memory that one could tell of."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta or tensor.numel() == 0:
        return 0, 0
    begin = tensor.data_ptr()
    if tensor.is_contiguous():
        return begin, begin + tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


def is_same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same elements of the same memory, or nothing can be told of it."""
    return one is other or (_memory(one) == _memory(other) and one.dtype == other.dtype and one.stride() == other.stride())


def check_apart(op: str, target: Tensor, *, called: str = "target", **others: Tensor) -> None:
    """Raise ValueError where memory of ``target`` lies between the first and the last element of another argument."""
    if is_compiling():
        return
    begin, end = _memory(target)
    for name, other in others.items():
        other_begin, other_end = _memory(other)
        if begin < other_end and other_begin < end:
            raise ValueError(f"{op}: {called}: must not share memory with {name}")

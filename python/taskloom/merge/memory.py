"""Tensors in the process's memory as the planner and the executor see them: dtype code, shape and address.

Neither torch nor numpy is imported here: whoever passes a tensor has done that.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from taskloom.merge.errors import CheckpointError
from taskloom.merge.header import TensorEntry, tensor_bytes

MEMORY = Path("memory")

_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
_NAMES = {code: name for name, code in _CODES.items()}


@dataclass(frozen=True)
class MemoryTensor:
    """A tensor of a state dict, contiguous and in native byte order.

    Attributes
    ----------
    owner
        The torch tensor or numpy array whose memory ``entry`` describes: the caller's, or a copy where that was not contiguous.
    entry
        dtype code, shape and address. Other dtypes than F32, BF16, F16 and F64 go by their own names, and are only ever copied.
    identity
        Equal for two tensors of one model that are the same memory seen in the same way, as tied weights are.
    device
        ``cpu``, or ``cuda:N``, where the address is one of that device.
    """

    owner: Any
    entry: TensorEntry
    identity: Hashable
    device: str = "cpu"


def _is_torch(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_numpy(value: object) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _entry(dtype: str, shape: tuple[int, ...], address: int) -> TensorEntry:
    code = _CODES.get(dtype, dtype)
    return TensorEntry(MEMORY, address, tensor_bytes(code, shape) if code in _NAMES else 0, code, shape)


def _identity(address: int, entry: TensorEntry, strides: tuple[int, ...]) -> Hashable:
    # Empty tensors may share an address by chance.
    return (address, entry.dtype, entry.shape, strides) if prod(entry.shape) else object()


def _describe_torch(value: Any, where: str) -> MemoryTensor:
    if value.device.type not in ("cpu", "cuda"):
        raise CheckpointError(f"{where}: expected a tensor in CPU memory or on a CUDA device, got one on {value.device}")
    if str(value.layout) != "torch.strided":
        raise CheckpointError(f"{where}: expected a dense tensor, got layout {value.layout}")
    dtype, shape = str(value.dtype).removeprefix("torch."), tuple(value.shape)
    owner = value.detach().resolve_neg().contiguous()
    entry = _entry(dtype, shape, owner.data_ptr())
    return MemoryTensor(owner, entry, _identity(value.data_ptr(), entry, tuple(value.stride())), str(value.device))


def _describe_numpy(value: Any, where: str) -> MemoryTensor:
    if value.dtype.kind == "f" and value.dtype.name not in _CODES:
        raise CheckpointError(f"{where}: expected float32, float16, float64 or an integer type, got {value.dtype.name}")
    import numpy

    native = value.dtype if value.dtype.isnative else value.dtype.newbyteorder("=")
    owner = numpy.asarray(value, dtype=native, order="C")
    entry = _entry(value.dtype.name, value.shape, owner.ctypes.data)
    return MemoryTensor(owner, entry, _identity(value.ctypes.data, entry, value.strides))


def describe(value: object, where: str) -> MemoryTensor:
    """Look at one tensor of a state dict.

    Parameters
    ----------
    value
        A dense torch tensor in CPU memory or on a CUDA device, or a numpy array; any strides. It is not modified.
    where
        Names the tensor and its model in error messages.

    Raises
    ------
    CheckpointError
        If it is something else, or a numpy floating-point type that cannot be merged.
    """
    if _is_torch(value):
        return _describe_torch(value, where)
    if _is_numpy(value):
        return _describe_numpy(value, where)
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    raise CheckpointError(f"{where}: expected a torch tensor or a numpy array, got {kind}")


def copied(tensor: MemoryTensor) -> Any:
    """A copy of a tensor, of its kind."""
    return tensor.owner.clone() if _is_torch(tensor.owner) else tensor.owner.copy()


def empty_like(tensor: MemoryTensor, code: str, where: str) -> MemoryTensor:
    """A fresh tensor of the kind and shape of another, with uninitialised values of the dtype ``code``.

    Raises
    ------
    CheckpointError
        If bfloat16 is asked of numpy, which has it only where the other is a bfloat16 array already (ml_dtypes).
    """
    shape = tensor.entry.shape
    if _is_torch(tensor.owner):
        torch = sys.modules["torch"]
        owner = torch.empty(shape, dtype=getattr(torch, _NAMES[code]), device=tensor.owner.device)
        return MemoryTensor(owner, _entry(_NAMES[code], shape, owner.data_ptr()), object(), tensor.device)
    import numpy

    if code == tensor.entry.dtype:
        dtype = tensor.owner.dtype
    elif code == "BF16":
        raise CheckpointError(f"{where}: numpy has no bfloat16 for the result; choose another out_dtype or pass torch tensors")
    else:
        dtype = numpy.dtype(_NAMES[code])
    array = numpy.empty(shape, dtype=dtype)
    return MemoryTensor(array, _entry(_NAMES[code], shape, array.ctypes.data), object())

"""Checks of tensors that task vectors are made of, and of the numbers that they are multiplied by."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, Literal, TypeGuard, get_args

import torch
from torch import Tensor, nn

from taskloom.merge.task_vector.sources import DTYPES

Regime = Literal["linear", "nonlinear"]

_SHOWN = 3
_NARROW = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    listed = sorted(names)
    return ", ".join(map(repr, listed[:_SHOWN])) + (f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else "")


def check_regime(regime: str) -> Regime:
    """The regime itself; raises ValueError where it is none."""
    for known in get_args(Regime):
        if regime == known:
            found: Regime = known
            return found
    raise ValueError(f"TaskVector: regime: expected 'linear' or 'nonlinear', got {regime!r}")


def check_dtype(dtype: object, argument: str = "dtype") -> None:
    """Raise unless ``dtype`` is one that deltas can be stored in."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"TaskVector: {argument}: expected a torch.dtype, got {type(dtype).__name__}")
    if dtype not in DTYPES:
        raise TypeError(f"TaskVector: {argument}: expected float32, bfloat16, float16 or float64, got {dtype}")


def is_number(value: object) -> TypeGuard[Real]:
    """Whether a value is a real number; True and False are none."""
    return not isinstance(value, bool) and isinstance(value, Real)


def check_number(value: object, argument: str) -> float:
    """A finite number as a float."""
    if not is_number(value):
        raise TypeError(f"TaskVector: {argument}: expected a number, got {type(value).__name__}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"TaskVector: {argument}: expected a finite number, got {number}")
    return number


def is_delta(tensor: Tensor, where: str) -> bool:
    """Whether a tensor has a difference: floating-point ones have, integer and bool ones have none.

    Raises
    ------
    TypeError
        If it is of a dtype that is neither, such as complex or an 8-bit float.
    ValueError
        If it has no values to look at (sharded, sparse, quantized, on the meta device, not initialised yet), or lies neither in CPU nor in
        CUDA memory.
    """
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        raise ValueError(f"{where}: is not initialised yet; run the lazy module once first")
    if hasattr(tensor, "__tensor_flatten__"):
        raise ValueError(f"{where}: expected a plain tensor, got a {type(tensor).__name__} (a sharded or quantized one)")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"{where}: expected a dense tensor, got {'a quantized one' if tensor.is_quantized else tensor.layout}")
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{where}: expected a tensor in CPU or CUDA memory, got one on {tensor.device}")
    if tensor.dtype in DTYPES:
        return True
    if tensor.dtype in _NARROW:
        return False
    raise TypeError(f"{where}: expected float32, bfloat16, float16, float64, an integer type or bool, got {tensor.dtype}")


def named_tensors(model: object, argument: str) -> dict[str, Tensor]:
    """The tensors of a state dict, or of a module's, detached.

    Raises
    ------
    TypeError
        If ``model`` is neither, or a value is no tensor.
    """
    if isinstance(model, nn.Module):
        found: Mapping[Any, Any] = model.state_dict(keep_vars=True)
    elif isinstance(model, Mapping):
        found = model
    else:
        raise TypeError(f"{argument}: expected a state dict or an nn.Module, got {type(model).__name__}")
    tensors: dict[str, Tensor] = {}
    for name, value in found.items():
        if not isinstance(name, str):
            raise TypeError(f"{argument}: expected names that are text, got {name!r}")
        if not isinstance(value, Tensor):
            # What a module's get_extra_state gives is no weight.
            if isinstance(model, nn.Module) and name.endswith("_extra_state"):
                continue
            raise TypeError(f"{argument}: {name!r}: expected a tensor, got {type(value).__name__}")
        tensors[name] = value.detach() if not isinstance(value, (nn.UninitializedParameter, nn.UninitializedBuffer)) else value
    return tensors


def first_nonfinite(tensor: Tensor) -> tuple[int, float] | None:
    """Place and value of the first NaN or infinity of a tensor; None where all is finite."""
    # A sum is far cheaper than a mask, and is finite where every entry is, unless it overflows: float16's does easily, float64's hardly.
    if math.isfinite(float(tensor.sum())) or math.isfinite(float(tensor.sum(dtype=torch.float64))):
        return None
    bad = torch.isfinite(tensor.reshape(-1)).logical_not_()
    if not bool(bad.any()):
        return None
    place = int(bad.nonzero()[0])
    return place, float(tensor.reshape(-1)[place])


def check_finite(tensor: Tensor, where: str) -> None:
    """Raise ValueError where a tensor holds NaN or infinity."""
    bad = first_nonfinite(tensor)
    if bad is not None:
        raise ValueError(f"{where}: holds {bad[1]} at entry {bad[0]}, expected finite values")


def check_overflow(tensor: Tensor, where: str, what: str = "the difference") -> None:
    """Raise ValueError where a computed tensor went over the largest number of its dtype."""
    bad = first_nonfinite(tensor)
    if bad is not None:
        raise ValueError(f"{where}: {what} overflows {tensor.dtype} at entry {bad[0]}")

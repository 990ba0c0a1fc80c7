"""The dtype that arithmetic on tensors uses."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where a tensor is float64, else float32; None is no tensor."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast makes of inputs on a tensor's device; None where it is off."""
    kind = tensor.device.type
    # There are devices without autocast, and torch raises for these.
    return torch.get_autocast_dtype(kind) if kind in ("cpu", "cuda", "xpu") and torch.is_autocast_enabled(kind) else None


def without_autocast(function: Callable[Concatenate[Tensor, Arguments], Result]) -> Callable[Concatenate[Tensor, Arguments], Result]:
    """Let torch's own products, from which ``function`` is composed, compute in the dtypes that they are given."""

    @wraps(function)
    def composed(first: Tensor, /, *arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        if autocast_dtype(first) is None:
            return function(first, *arguments, **named)
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *arguments, **named)

    return composed

"""Checks of a convolution's settings that the routed ops share."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, TypeAlias

import torch
from torch import Tensor

Pair: TypeAlias = int | Sequence[int]

_INTEGERS = (int, torch.SymInt, Integral)


def check_integer(op: str, name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is an integer, NumPy's too, or one that is not known yet."""
    if isinstance(value, bool) or not isinstance(value, _INTEGERS):
        raise TypeError(f"{op}: {name}: expected an integer, got {type(value).__name__}")


def pair(op: str, name: str, value: object, least: int) -> list[int]:
    """Two numbers, down and across; raise where one is less than ``least``."""
    if type(value) is int and value >= least:
        return [value, value]
    both: list[Any] = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value, value]
    if len(both) != 2:
        raise ValueError(f"{op}: {name}: expected one number or two, got {value!r}")
    for one in both:
        check_integer(op, name, one)
        if one < least:
            raise ValueError(f"{op}: {name}: expected at least {least}, got {value!r}")
    return both


def check_kernel(op: str, weight: Tensor) -> None:
    """Raise ValueError where a kernel [.., .., kh, kw] has no entry."""
    if weight.shape[2] < 1 or weight.shape[3] < 1:
        raise ValueError(f"{op}: weight: expected a kernel of at least 1 by 1, got {tuple(weight.shape)}")

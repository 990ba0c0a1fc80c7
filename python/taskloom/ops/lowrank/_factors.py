"""Arguments that the ops of thin factors share: lists of factors, and one weight for each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from taskloom.ops._checks import check_floating
from taskloom.reference.arithmetic import accumulation_dtype

Numbers = float | Sequence[float] | Tensor


def check_matrix(op: str, name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is a matrix of a dtype that the kernels compute with."""
    check_floating(op, name, tensor)
    if tensor.dim() != 2:
        raise ValueError(f"{op}: {name}: expected two dimensions, got shape {tuple(tensor.shape)}")


def listed_factors(
    op: str, A: Tensor | Sequence[Tensor], B: Tensor | Sequence[Tensor], base: Tensor, of: str
) -> tuple[list[Tensor], list[Tensor]]:
    """The factors of each adapter, checked against the matrix that they are added to."""
    for name, factors in (("A", A), ("B", B)):
        if not isinstance(factors, Iterable):
            raise TypeError(f"{op}: {name}: expected a tensor or a sequence of tensors, got {type(factors).__name__}")
    right = [A] if isinstance(A, Tensor) else list(A)
    left = [B] if isinstance(B, Tensor) else list(B)
    if len(left) != len(right):
        raise ValueError(f"{op}: B: expected {len(right)} factors as A, got {len(left)}")
    rows, columns = base.shape
    single = isinstance(A, Tensor)
    for place, (a, b) in enumerate(zip(right, left, strict=True)):
        suffix = "" if single else f"[{place}]"
        check_matrix(op, f"A{suffix}", a)
        check_matrix(op, f"B{suffix}", b)
        if a.shape[1] != columns:
            raise ValueError(f"{op}: A{suffix}: expected shape (r, {columns}) for {of} {tuple(base.shape)}, got {tuple(a.shape)}")
        if b.shape != (rows, a.shape[0]):
            raise ValueError(f"{op}: B{suffix}: expected shape {(rows, a.shape[0])} for A of rank {a.shape[0]}, got {tuple(b.shape)}")
    return right, left


def check_numbers(op: str, name: str, values: object) -> None:
    """Raise TypeError unless these are a number or several; a tensor is neither."""
    if isinstance(values, Tensor) or not isinstance(values, (int, float, Iterable)):
        raise TypeError(f"{op}: {name}: expected a number or a sequence of numbers, got {type(values).__name__}")


def _numbers(op: str, name: str, values: float | Sequence[float], count: int) -> list[float]:
    check_numbers(op, name, values)
    listed = [values] * count if isinstance(values, (int, float)) else list(values)
    if len(listed) != count:
        raise ValueError(f"{op}: {name}: expected one number or one for each of {count} adapters, got {len(listed)}")
    for value in listed:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise TypeError(f"{op}: {name}: expected numbers, got {type(value).__name__}; a tensor of them has gradients")
    return listed


def adapter_weights(op: str, weight: Numbers, scale: float | Sequence[float], count: int, *tensors: Tensor) -> Tensor:
    """``weight * scale`` as a tensor, an entry per adapter, in the dtype of the arithmetic; the gradient of a tensor is kept."""
    scales = _numbers(op, "scale", scale, count)
    if not isinstance(weight, Tensor):
        products = [one * other for one, other in zip(_numbers(op, "weight", weight, count), scales, strict=True)]
        return torch.tensor(products, dtype=accumulation_dtype(*tensors), device=tensors[0].device)
    check_floating(op, "weight", weight)
    if weight.dim() > 1 or (weight.dim() == 1 and weight.shape[0] != count):
        raise ValueError(f"{op}: weight: expected shape () or ({count},), one for each adapter, got {tuple(weight.shape)}")
    wide = weight.to(accumulation_dtype(weight)).expand(count)
    if all(one == 1 for one in scales):
        return wide
    return wide * torch.tensor(scales, dtype=wide.dtype, device=wide.device)

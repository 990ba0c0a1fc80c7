"""The difference of two models in memory."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from taskloom.merge.task_vector.checks import check_finite, check_overflow, first_nonfinite, is_delta, named_tensors, some


def _common(base: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], strict: bool) -> list[str]:
    missing, extra = base.keys() - finetuned.keys(), finetuned.keys() - base.keys()
    if missing or extra:
        parts = ([f"finetuned lacks {some(missing)}"] if missing else []) + ([f"base lacks {some(extra)}"] if extra else [])
        message = f"TaskVector: the models' names differ: {'; '.join(parts)}"
        if strict:
            raise KeyError(f"{message}; strict=False takes what both have")
        warnings.warn(f"{message}; left out", stacklevel=4)
    return [name for name in base if name in finetuned]


def _check_pair(name: str, base: Tensor, tuned: Tensor) -> bool:
    """Whether two tensors of one name have a difference."""
    where = f"TaskVector: {name!r}"
    has_delta = is_delta(base, f"{where} of base")
    if is_delta(tuned, f"{where} of finetuned") != has_delta:
        raise TypeError(f"{where}: is {base.dtype} in base and {tuned.dtype} in finetuned, expected floating point in both or in neither")
    if tuned.shape != base.shape:
        raise ValueError(f"{where}: has shape {tuple(tuned.shape)} in finetuned, expected {tuple(base.shape)} as in base")
    if tuned.device != base.device:
        raise ValueError(f"{where}: is on {tuned.device} in finetuned, expected {base.device} as in base")
    return has_delta


def subtract(base: Tensor, tuned: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``tuned - base`` in float32, or float64 where either is, rounded to ``dtype``; contiguous and in fresh memory."""
    wide = torch.float64 if torch.float64 in (base.dtype, tuned.dtype) else torch.float32
    delta = torch.empty(base.shape, dtype=wide, device=base.device).copy_(tuned)
    delta.sub_(base)
    return delta if dtype is None else delta.to(dtype)


def identity(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two names of one tensor, if it is not empty."""
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device


def difference(base: object, finetuned: object, dtype: torch.dtype | None, strict: bool) -> dict[str, Tensor]:
    """The deltas of the floating-point tensors that two models have, by name in the base's order.

    Names that are one tensor in both models (tied weights) have one delta in memory.

    Raises
    ------
    KeyError
        If the models' names differ and ``strict``.
    TypeError
        If a model is neither a state dict nor a module, or a tensor is of a dtype without a difference and not an integer type.
    ValueError
        If shapes or devices differ, a value is not finite, or a difference overflows.
    """
    before, after = named_tensors(base, "TaskVector: base"), named_tensors(finetuned, "TaskVector: finetuned")
    deltas: dict[str, Tensor] = {}
    known: dict[object, Tensor] = {}
    for name in _common(before, after, strict):
        old, new = before[name], after[name]
        if not _check_pair(name, old, new):
            continue
        pair = (identity(old), identity(new))
        if pair in known and old.numel():
            deltas[name] = known[pair]
            continue
        delta = subtract(old, new, dtype)
        if first_nonfinite(delta) is not None:
            check_finite(old, f"TaskVector: {name!r} of base")
            check_finite(new, f"TaskVector: {name!r} of finetuned")
            check_overflow(delta, f"TaskVector: {name!r}")
        known[pair] = deltas[name] = delta
    return deltas

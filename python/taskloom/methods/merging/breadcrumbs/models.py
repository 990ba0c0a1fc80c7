"""The models that are merged: their tensors by name, and whether they fit each other."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

Model = Mapping[str, Tensor] | nn.Module

_SHOWN = 3


def some(names: Collection[str]) -> str:
    """The first few names, and how many more there are."""
    first = ", ".join(repr(name) for name in list(names)[:_SHOWN])
    return first + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def tensors_of(op: str, argument: str, model: object) -> Mapping[str, Tensor]:
    """The tensors of a state dict or a module, detached, by name.

    Raises
    ------
    TypeError
        If the model is something else, or holds something else than tensors.
    """
    given: Mapping[Any, Any]
    if isinstance(model, nn.Module):
        given = model.state_dict()
    elif isinstance(model, Mapping):
        given = model
    else:
        raise TypeError(f"{op}: {argument}: expected a state dict or a torch.nn.Module, got {type(model).__name__}")
    for name, value in given.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise TypeError(f"{op}: {argument}: expected tensors by name, got {name!r} with {type(value).__name__}")
    return {name: value.detach() for name, value in given.items()}


def _difference(names: Collection[str], others: Collection[str]) -> str:
    missing = [name for name in names if name not in others]
    extra = [name for name in others if name not in names]
    parts = [f"lacks {some(missing)}"] if missing else []
    return " and ".join(parts + ([f"has {some(extra)}, which base lacks"] if extra else []))


def common_names(op: str, base: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]], strict: bool) -> list[str]:
    """Names that the base and every model have, in the base's order.

    Raises
    ------
    KeyError
        If the names differ and ``strict`` is true, or no name is common.
    """
    different = [f"finetuned[{number}] {_difference(base, model)}" for number, model in enumerate(models) if base.keys() != model.keys()]
    names = [name for name in base if all(name in model for model in models)]
    if different and (strict or not names):
        hint = "; strict=False merges what all have" if names else ""
        raise KeyError(f"{op}: {different[0]}{hint}")
    if different:
        # From here over merge_breadcrumbs to its caller.
        warnings.warn(f"{op}: {'; '.join(different)}: the {len(names)} names that all have are merged", stacklevel=3)
    return names


def check_fit(op: str, name: str, base: Tensor, tensors: Sequence[Tensor]) -> None:
    """Raise unless the models' tensors of a name are like the base's: TypeError for a dtype, ValueError for shape and device."""
    for number, tensor in enumerate(tensors):
        where = f"{op}: finetuned[{number}]: tensor {name!r}"
        if not tensor.is_floating_point():
            raise TypeError(f"{where}: expected a floating-point dtype as in base, {base.dtype}, got {tensor.dtype}")
        if tensor.shape != base.shape:
            raise ValueError(f"{where}: expected shape {tuple(base.shape)} as in base, got {tuple(tensor.shape)}")
        if tensor.device != base.device:
            raise ValueError(f"{where}: expected it on {base.device} as in base, got {tensor.device}")


def _memory(tensor: Tensor) -> Hashable:
    # Empty tensors may share an address by chance.
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else id(tensor)


def second_names(base: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> dict[str, str]:
    """Names whose tensor is the same memory as that of an earlier name in the base and in every model (tied weights), with that name."""
    first: dict[Hashable, str] = {}
    found = {}
    for name in names:
        place = tuple(_memory(model[name]) for model in (base, *models))
        original = first.setdefault(place, name)
        if original != name:
            found[name] = original
    return found

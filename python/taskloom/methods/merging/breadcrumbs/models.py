"""The models that are merged: their tensors by name, and whether they fit the base."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taskloom.merge.task_vector import TaskVector
from taskloom.ops._checks import FLOATING

Model = Mapping[str, Tensor] | nn.Module | TaskVector

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
    elif isinstance(model, Mapping) and not isinstance(model, TaskVector):
        given = model
    else:
        raise TypeError(f"{op}: {argument}: expected a state dict or a torch.nn.Module, got {type(model).__name__}")
    for name, value in given.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise TypeError(f"{op}: {argument}: expected tensors by name, got {name!r} with {type(value).__name__}")
    return {name: value.detach() for name, value in given.items()}


def _memory(tensor: Tensor) -> Hashable:
    # Empty tensors may share an address by chance.
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else id(tensor)


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned model under the argument that it came by: its tensors, or as a task vector its differences from the base."""

    argument: str
    tensors: Mapping[str, Tensor] | TaskVector

    @property
    def is_vector(self) -> bool:
        """Whether the tensors are differences."""
        return isinstance(self.tensors, TaskVector)

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor, which is not read for it."""
        return self.tensors.dtypes[name] if isinstance(self.tensors, TaskVector) else self.tensors[name].dtype

    def delta(self, name: str, base: Tensor, wide: torch.dtype) -> Tensor:
        """The difference of a tensor from the base's, taken in the dtype ``wide``."""
        if not isinstance(self.tensors, TaskVector):
            return self.tensors[name].to(wide) - base.to(wide)
        found = self.tensors[name]
        # What comes from a file lies on the CPU.
        return found if self.tensors.in_memory else found.to(base.device)

    def is_one(self, name: str, other: str) -> bool:
        """Whether two names are one tensor; of a vector, whether they have one value."""
        one, two = self.tensors[name], self.tensors[other]
        return torch.equal(one, two) if self.is_vector else _memory(one) == _memory(two)

    def difference(self, base: Mapping[str, Tensor]) -> str:
        """What it lacks of the base's names, or has beside them, in words; a vector has none of what is no floating-point tensor."""
        expected = [name for name, tensor in base.items() if tensor.is_floating_point() or not self.is_vector]
        missing = [name for name in expected if name not in self.tensors]
        extra = [name for name in self.tensors if name not in base]
        parts = [f"lacks {some(missing)}"] if missing else []
        return " and ".join(parts + ([f"has {some(extra)}, which base lacks"] if extra else []))

    def check_fit(self, op: str, name: str, base: Tensor) -> None:
        """Raise unless a tensor is like the base's: TypeError for a dtype, ValueError for shape and device."""
        where = f"{op}: {self.argument}: tensor {name!r}"
        if self.dtype(name) not in FLOATING:
            raise TypeError(f"{where}: expected float32, bfloat16, float16 or float64, got {self.dtype(name)}")
        shape = self.tensors.shapes[name] if isinstance(self.tensors, TaskVector) else tuple(self.tensors[name].shape)
        if shape != tuple(base.shape):
            raise ValueError(f"{where}: expected shape {tuple(base.shape)} as in base, got {shape}")
        streamed = isinstance(self.tensors, TaskVector) and not self.tensors.in_memory
        if not streamed and (device := self.tensors[name].device) != base.device:
            raise ValueError(f"{where}: expected it on {base.device} as in base, got {device}")


def tuned_models(op: str, finetuned: object) -> list[Tuned]:
    """The fine-tuned models of an argument.

    Raises
    ------
    TypeError
        If it is no list of models.
    ValueError
        If it is empty, or holds task vectors of both regimes.
    """
    if not isinstance(finetuned, (list, tuple)):
        raise TypeError(f"{op}: finetuned: expected a list of models, got {type(finetuned).__name__}")
    if not finetuned:
        raise ValueError(f"{op}: finetuned: expected at least one model, got none")
    if len({model.regime for model in finetuned if isinstance(model, TaskVector)}) > 1:
        raise ValueError(f"{op}: finetuned: expected task vectors of one regime, got both; convert some with as_regime()")
    arguments = [f"finetuned[{number}]" for number in range(len(finetuned))]
    return [
        Tuned(argument, model if isinstance(model, TaskVector) else tensors_of(op, argument, model))
        for argument, model in zip(arguments, finetuned, strict=True)
    ]


def common_names(op: str, base: Mapping[str, Tensor], models: Sequence[Tuned], strict: bool) -> list[str]:
    """Names of the base's floating-point tensors that every model has, in the base's order.

    Raises
    ------
    KeyError
        If the models' names differ from the base's and ``strict`` is true, or no name is common.
    """
    different = [f"{model.argument} {words}" for model in models if (words := model.difference(base))]
    names = [name for name in base if all(name in model.tensors for model in models) and base[name].is_floating_point()]
    if different and (strict or not names):
        hint = "; strict=False merges what all have" if names else ""
        raise KeyError(f"{op}: {different[0]}{hint}")
    if different:
        # From here over merge_breadcrumbs to its caller.
        warnings.warn(f"{op}: {'; '.join(different)}: the {len(names)} floating-point tensors that all have are merged", stacklevel=3)
    return names


def second_names(base: Mapping[str, Tensor], models: Sequence[Tuned], names: Sequence[str]) -> dict[str, str]:
    """Names whose tensor is one with that of an earlier name in the base and in every model (tied weights), with that name."""
    first: dict[Hashable, list[str]] = {}
    found = {}
    for name in names:
        earlier = first.setdefault(_memory(base[name]), [])
        original = next((other for other in earlier if all(model.is_one(name, other) for model in models)), None)
        if original is None:
            earlier.append(name)
        else:
            found[name] = original
    return found

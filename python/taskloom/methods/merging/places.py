"""Where a model's parameters are, for what puts others there for a while."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

# A parameter's place: the module that holds it, and its name there.
Place = tuple[nn.Module, str]


def place_of(model: nn.Module, name: str) -> Place:
    """The place of a parameter or buffer."""
    path, _, own = name.rpartition(".")
    return model.get_submodule(path), own


def one_a_place(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """The first name of each place: a module that the model has twice is one place, which functional_call would not give back."""
    found: dict[Place, str] = {}
    for name in names:
        found.setdefault(place_of(model, name), name)
    return tuple(found.values())


def call_with(model: nn.Module, parameters: Mapping[str, Tensor], args: tuple[Any, ...]) -> Any:
    """Call a model with other parameters, by their first names; it has its own again afterwards, also where a module is there twice."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, one in model.named_parameters(remove_duplicate=False):
        names.setdefault(one, []).append(name)
    every = {name: parameters[own[0]] for own in names.values() if own[0] in parameters for name in one_a_place(model, own)}
    return functional_call(model, every, args, tie_weights=False)

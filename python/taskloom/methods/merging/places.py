"""Where a model's parameters are, for what puts others there for a while."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

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

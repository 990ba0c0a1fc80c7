"""Refuses numbers of a recipe that float32, in which most tensors are merged, cannot hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from taskloom.merge.errors import RecipeError, shown
from taskloom.merge.parameters import Position, Setting, matching_rule, resolve
from taskloom.merge.recipe import Recipe
from taskloom.merge.resolve import Task

_MOST = (2 - 2**-23) * 2.0**127


def _magnitude(value: object) -> float:
    return abs(value) if isinstance(value, int | float) else 0.0


def _may_be_beyond(recipe: Recipe, tasks: Sequence[Task]) -> bool:
    """Whether any number is so large that alone, or in the sum of all weights, it may leave the range."""
    settings = (recipe.settings, *(task.settings for task in tasks))
    numbers = (value for own in settings for setting in own.values() for rule in setting for value in rule.values)
    return any(_magnitude(value) > _MOST / len(tasks) for value in numbers)


def _uses(recipe: Recipe, tasks: Sequence[Task], name: str, position: Position) -> Iterator[tuple[str, float, str]]:
    """Parameter, value and place in the recipe of every number that is set for a tensor."""
    for parameter in recipe.method.parameters:
        # A count is compared with the number of models, so that any size will do.
        if parameter.inert or parameter.kind != "number":
            continue
        sources: list[tuple[Mapping[str, Setting], ...]] = [(recipe.settings,)]
        if parameter.per_model:
            sources = [(task.settings, recipe.settings) for task in tasks]
        for source in sources:
            rule = matching_rule(parameter, source, name)
            if rule is not None:
                value = resolve(parameter, source, name, position.t)
                if isinstance(value, float):
                    yield parameter.name, value, rule.where


def check_range(recipe: Recipe, tasks: Sequence[Task], names: Sequence[str], positions: Mapping[str, Position]) -> None:
    """Refuse numbers, and weights whose sum is, beyond the range of float32.

    Parameters
    ----------
    recipe, tasks
        The settings.
    names
        Of the tensors that are merged in float32.
    positions
        Of every tensor.

    Raises
    ------
    RecipeError
        Naming the place in the recipe, the value and the first such tensor.
    """
    if not _may_be_beyond(recipe, tasks):
        return
    for name in names:
        total = 0.0
        for parameter, value, where in _uses(recipe, tasks, name, positions[name]):
            if abs(value) > _MOST:
                raise RecipeError(
                    f"{where}: {value:g} for tensor {shown(name)} does not fit float32, in which it is merged: at most {_MOST:g}"
                )
            total += abs(value) if parameter == "weight" else 0.0
            if total > _MOST:
                raise RecipeError(
                    f"{where}: the weights for tensor {shown(name)} sum to {total:g}, which does not fit float32, in which it is merged: "
                    f"at most {_MOST:g}"
                )

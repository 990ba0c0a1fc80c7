"""From what a user wants to the widths of the decoders: the rule that gives a preferred task more to compute with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from operator import index
from typing import Any

from taskloom.methods.channels.controllable_mtl.config import check_ratio
from taskloom.methods.channels.controllable_mtl.model import SlimMultiTask

Preference = Mapping[str, float] | Sequence[float]


class InfeasibleBudget(ValueError):
    """No configuration is as cheap as asked for.

    Attributes
    ----------
    minimum
        The floating point operations of the cheapest.
    """

    def __init__(self, message: str, minimum: int) -> None:
        super().__init__(message)
        self.minimum = minimum

    def __reduce__(self) -> tuple[type[InfeasibleBudget], tuple[str, int]]:
        return type(self), (str(self), self.minimum)


def check_grid(grid: Sequence[float]) -> tuple[float, ...]:
    """The widths in rising order, without repetitions."""
    if not grid:
        raise ValueError("search_widths: grid: expected at least one ratio, got none")
    return tuple(sorted({check_ratio("search_widths: grid", width) for width in grid}))


def check_preference(model: SlimMultiTask, preference: Preference) -> dict[str, float]:
    """The preference of each task, in the model's order."""
    if isinstance(preference, Mapping):
        model.check_tasks("search_widths: preference", preference, every=True)
        found = {task: float(preference[task]) for task in model.tasks}
    else:
        given: Any = preference
        if isinstance(given, str) or not hasattr(given, "__len__"):
            raise TypeError(f"search_widths: preference: expected a value per task, got {preference!r}")
        if len(preference) != len(model.tasks):
            raise ValueError(f"search_widths: preference: expected {len(model.tasks)} values, one per task, got {len(preference)}")
        found = {task: float(value) for task, value in zip(model.tasks, preference, strict=True)}
    if not all(math.isfinite(value) and value >= 0 for value in found.values()):
        raise ValueError(f"search_widths: preference: expected finite values of at least 0, got {found}")
    if abs(math.fsum(found.values()) - 1) > 1e-6:
        raise ValueError(f"search_widths: preference: expected a sum of 1, got {math.fsum(found.values())}")
    return found


def check_budget(budget: Any, full: int) -> int:
    """The budget in floating point operations."""
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise TypeError(f"search_widths: budget: expected operations (int) or a share of the whole network's (float), got {budget!r}")
    if isinstance(budget, Integral):
        operations = index(budget)
        if operations < 1:
            raise ValueError(f"search_widths: budget: expected at least 1 operation, got {operations}")
        return operations
    share = float(budget)
    if not 0 < share <= 1:
        raise ValueError(f"search_widths: budget: expected a share in (0, 1], or operations as an int, got {share}")
    return int(share * full)


def decoder_levels(preference: Mapping[str, float], grid: tuple[float, ...]) -> list[dict[str, float]]:
    """The decoders' widths: those of the preference, then all of them one step of the grid lower at a time, until all are the least.

    Parameters
    ----------
    preference
        As :func:`check_preference` gives it.
    grid
        As :func:`check_grid` gives it.

    Returns
    -------
    list of dict
        A width per task. They rise with the preferences, equal ones get equal widths, and in the first the most preferred task has the
        grid's greatest.
    """
    low, high, top = grid[0], grid[-1], max(preference.values())
    wanted = {task: low + (high - low) * (value / top) for task, value in preference.items()}
    # The nearest of the grid; the greater of two that are as near.
    first = {task: max(range(len(grid)), key=lambda place: (-abs(grid[place] - width), place)) for task, width in wanted.items()}
    return [{task: grid[max(place - step, 0)] for task, place in first.items()} for step in range(max(first.values()) + 1)]

"""The choice of the coefficient of an edit on validation data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

GRID = tuple(step / 20 for step in range(21))

Evaluate = Callable[[float], float | Iterable[float]]


@dataclass(frozen=True)
class Control:
    """A bound on what an edit may cost elsewhere: ``measure(alpha) >= least``, such as 0.95 times the base's control accuracy."""

    measure: Callable[[float], float]
    least: float


@dataclass(frozen=True)
class AlphaRow:
    """One coefficient: the tasks' values, their (normalised) mean, the control's value, and whether the control allows it."""

    alpha: float
    values: tuple[float, ...]
    score: float
    control: float | None
    allowed: bool


def _finite(value: float, where: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"search_alpha: {where}: expected a finite number, got {number}")
    return number


def _numbers(measured: float | Iterable[float]) -> list[float]:
    # An array or a tensor without dimensions calls itself iterable, and is one number.
    if isinstance(measured, Iterable) and getattr(measured, "ndim", None) != 0:
        return [float(value) for value in measured]
    number: Any = measured
    return [float(number)]


def _row(alpha: float, evaluate: Evaluate, normalise: Sequence[float] | None, constraint: Control | None) -> AlphaRow:
    values = tuple(_finite(value, f"evaluate({alpha})") for value in _numbers(evaluate(alpha)))
    units = [1.0] * len(values) if normalise is None else list(normalise)
    if not values or len(units) != len(values):
        raise ValueError(f"search_alpha: evaluate({alpha}): expected {len(units) or 'one or more'} values, got {len(values)}")
    score = fmean(value / unit for value, unit in zip(values, units, strict=True))
    control = None if constraint is None else _finite(constraint.measure(alpha), f"constraint.measure({alpha})")
    return AlphaRow(alpha, values, score, control, constraint is None or control is None or control >= constraint.least)


def search_alpha(
    evaluate: Evaluate,
    grid: Sequence[float] = GRID,
    normalise: Sequence[float] | None = None,
    constraint: Control | None = None,
    *,
    goal: Literal["max", "min"] = "max",
) -> tuple[float, list[AlphaRow]]:
    """The coefficient of a grid with the best mean value among those that a control allows.

    Parameters
    ----------
    evaluate
        Validation accuracy at a coefficient: one per task, or a single number.
    grid
        Coefficients in order; of equally good ones the first wins. Default: 21 from 0 to 1.
    normalise
        Single-task accuracies **of the same regime** (ordinary, post-hoc or linear) that the tasks' values are divided by. Default
        None: not divided.
    constraint
        For negation: the control that has to keep its accuracy. Default None.
    goal
        ``"max"`` (default) for addition, ``"min"`` for negation, whose target is to be forgotten.

    Returns
    -------
    float, list[AlphaRow]
        The coefficient, and what was measured at each.

    Raises
    ------
    ValueError
        If the grid is empty, a value is not finite, coefficients have different numbers of values, ``normalise`` holds a number that is
        not above 0 or is of another length, or the control allows no coefficient.

    Warns
    -----
    UserWarning
        If 0 wins: no coefficient was better than no edit at all.

    Notes
    -----
    Source: Ortiz-Jimenez et al., NeurIPS 2023, arXiv 2305.12827, section 5 and its code (src/eval.py).
    """
    if goal not in ("max", "min"):
        raise ValueError(f"search_alpha: goal: expected 'max' or 'min', got {goal!r}")
    alphas = [_finite(alpha, "grid") for alpha in grid]
    if not alphas:
        raise ValueError("search_alpha: grid: expected at least one alpha, got none")
    for unit in normalise or ():
        if _finite(unit, "normalise") <= 0:
            raise ValueError(f"search_alpha: normalise: expected accuracies above 0, got {unit}")
    table = [_row(alpha, evaluate, normalise, constraint) for alpha in alphas]
    for row in table:
        if len(row.values) != len(table[0].values):
            raise ValueError(f"search_alpha: evaluate({row.alpha}): expected {len(table[0].values)} values, got {len(row.values)}")
    allowed = [row for row in table if row.allowed]
    if not allowed:
        assert constraint is not None
        best = max(row.control for row in table if row.control is not None)
        raise ValueError(f"search_alpha: grid: no alpha keeps the control at {constraint.least} or above; the best one has {best}")
    # max() and min() keep the first of equals.
    chosen = (max if goal == "max" else min)(allowed, key=lambda row: row.score)
    if chosen.alpha == 0:
        warnings.warn("search_alpha: alpha 0 won: no edit on the grid was better than none", stacklevel=2)
    return chosen.alpha, table

"""Picks each task's threshold by its validation score."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from taskloom.archive.states import TaskStates, Weights, change_counts, read_states
from taskloom.archive.tasks import check_vector, masks_of, restore_task

LAMBDA_GRID = (0.2, 0.3, 0.4, 0.5, 0.6)

Evaluate = Callable[[str, dict[str, Tensor]], float]


def _checked(grid: Sequence[float]) -> list[float]:
    if not grid:
        raise ValueError("grid: expected at least one threshold, got none")
    for threshold in grid:
        if not 0 < threshold < math.inf:
            raise ValueError(f"grid: expected finite numbers > 0, got {threshold}")
    return sorted(float(threshold) for threshold in grid)


def select_lambdas(states: TaskStates, vector: Mapping[str, Tensor], evaluate: Evaluate, grid: Sequence[float]) -> dict[str, float]:
    """As :func:`select_lambda`, of states that are checked."""
    thresholds = _checked(grid)
    counts = change_counts(states)
    chosen = {}
    for task in states.tasks:
        best, best_score = thresholds[0], -math.inf
        for threshold in thresholds:
            score = float(evaluate(task, restore_task(states.base, vector, masks_of(states, vector, task, threshold))))
            if change_counts(states) != counts:
                raise ValueError(
                    f"evaluate: task {task!r}: expected base and fine-tuned models to stay as they are, but it changed their tensors; "
                    "load the state dict into a module of its own"
                )
            if math.isnan(score):
                raise ValueError(f"evaluate: task {task!r}, tall_mask_lambda {threshold:g}: expected a score, got NaN")
            if score > best_score:
                best, best_score = threshold, score
        chosen[task] = best
    return chosen


def select_lambda(
    base: Weights, finetuned: Mapping[str, Weights], tau: Mapping[str, Tensor], evaluate: Evaluate, grid: Sequence[float] = LAMBDA_GRID
) -> dict[str, float]:
    """Pick each task's ``tall_mask_lambda`` by the validation score of the weights that its mask restores.

    Parameters
    ----------
    base, finetuned, tau
        As in :func:`tall_masks`.
    evaluate
        Called as ``evaluate(task, state_dict)`` with restored weights in the base's dtypes; higher is better. It must not load them into
        a module that is ``base`` or one of ``finetuned``, whose memory is read here.
    grid
        Thresholds to try, each above 0. Default: the paper's.

    Returns
    -------
    dict[str, float]
        By task: the threshold with the highest score, the smallest of those that tie.

    Raises
    ------
    TypeError, ValueError, KeyError
        As :func:`tall_masks`; ValueError too if the grid is empty or out of range, a score is NaN, or ``evaluate`` changes the models.

    Notes
    -----
    Source: TALL-masks, Wang et al., ICML 2024, arXiv 2405.07813, section 3.
    """
    states = read_states(base, finetuned)
    check_vector(states, tau)
    return select_lambdas(states, tau, evaluate, grid)

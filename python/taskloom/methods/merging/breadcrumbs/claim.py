"""Two claims on projected digits: outliers do harm at a given density, and settings found on few tasks serve for more."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any

import torch

from taskloom.methods.claim import Claim, Inequality, Progress, Trial, Values
from taskloom.methods.merging import projected_digits
from taskloom.methods.merging.breadcrumbs.merge import merge_breadcrumbs
from taskloom.methods.merging.projected_digits import ProjectedDigits, State

TASK_ARITHMETIC = {"density": 1.0, "gamma": 0.0}


@dataclass(frozen=True)
class _Models:
    """The digits, and their models where the method computes."""

    digits: ProjectedDigits
    base: State
    tuned: list[State]
    device: torch.device

    def merged(self, tasks: int, settings: Mapping[str, Any]) -> State:
        """The first so many tasks in one encoder, on the CPU, where it is evaluated."""
        with warnings.catch_warnings():
            # Bounds of rows are too short for an outlier, which is part of what is measured.
            warnings.filterwarnings("ignore", message="merge_breadcrumbs: nothing of a model's delta")
            merged = merge_breadcrumbs(self.base, self.tuned[:tasks], **settings)
        return {name: tensor.cpu() for name, tensor in merged.items()}

    def validated(self, tasks: int, settings: Mapping[str, Any]) -> float:
        """Mean validation accuracy of the first so many tasks, merged alone."""
        encoder = self.merged(tasks, settings)
        return fmean(self.digits.accuracy(encoder, task, "val") for task in range(tasks))

    def tested(self, settings: Mapping[str, Any]) -> float:
        """Mean test accuracy of all tasks, merged."""
        return fmean(self.digits.accuracies(self.merged(len(self.tuned), settings)))


def _models(trial: Trial) -> _Models:
    digits = projected_digits.build(trial.seed, tasks=trial.config["tasks"], finetune_steps=trial.config["finetune_steps"])
    base, *tuned = ({name: tensor.to(trial.device) for name, tensor in state.items()} for state in (digits.base, *digits.tuned))
    return _Models(digits, base, tuned, trial.device)


def _measure_outliers(trial: Trial) -> Values:
    config = trial.config
    models = _models(trial)
    trial.progress(0.9)
    values = {}
    for granularity, weight in config["merges"]:
        for gamma in (config["gamma"], 0.0):
            settings = {"weight": weight, "density": config["density"], "gamma": gamma, "granularity": granularity}
            values[f"gamma {gamma:g}, {granularity}, weight {weight:g}"] = models.tested(settings)
    values["single tasks"] = fmean(models.digits.single_task)
    return values


def _grid(config: Mapping[str, Any]) -> dict[str, list[dict[str, float]]]:
    """The settings that each method is tuned over."""
    weights: Sequence[float] = config["weights"]
    return {
        "breadcrumbs": [
            {"weight": weight, "density": density, "gamma": gamma}
            for weight, density, gamma in product(weights, config["densities"], config["gammas"])
        ],
        "task arithmetic": [{"weight": weight, **TASK_ARITHMETIC} for weight in weights],
    }


def _best(models: _Models, tasks: int, grid: Sequence[Mapping[str, float]], done: Progress) -> Mapping[str, float]:
    """The settings that do best on validation data of the first so many tasks; the first of equal ones."""
    scores = []
    for place, settings in enumerate(grid):
        scores.append(models.validated(tasks, settings))
        done((place + 1) / len(grid))
    return grid[scores.index(max(scores))]


def _measure_transfer(trial: Trial) -> Values:
    config = trial.config
    models = _models(trial)
    trial.progress(0.3)
    values = {}
    few = [*config["few"], config["tasks"]]
    for place, tasks in enumerate(few):
        for method, grid in _grid(config).items():

            def done(share: float, place: int = place) -> None:
                trial.progress(0.3 + 0.7 * (place + share) / len(few))

            values[f"{method}, tuned on {tasks} tasks"] = models.tested(_best(models, tasks, grid, done))
    return values


def _transferred(values: Values, method: str) -> float:
    """Test accuracy of all tasks with settings found on few, mean over how many these were."""
    found = {arm: value for arm, value in values.items() if arm.startswith(f"{method}, tuned on ")}
    return fmean(value for arm, value in found.items() if arm != f"{method}, tuned on 8 tasks")


CLAIMS = (
    Claim(
        name="a",
        statement="At the same density, a merge is better without the largest entries of each task vector",
        metric="mean test accuracy of 8 tasks, higher is better",
        measure=_measure_outliers,
        baselines=("gamma 0, tensor, weight 1", "gamma 0, tensor, weight 0.5", "gamma 0, row, weight 1"),
        inequalities=(
            Inequality(
                "gamma 0.01 >= gamma 0 + 0.03 (tensor, weight 1)",
                lambda values: values["gamma 0.01, tensor, weight 1"] >= values["gamma 0, tensor, weight 1"] + 0.03,
            ),
        ),
        config={
            "tasks": 8,
            "finetune_steps": 150,
            "density": 0.15,
            "gamma": 0.01,
            "merges": [["tensor", 1.0], ["tensor", 0.5], ["row", 1.0]],
        },
        quick={"finetune_steps": 5},
        note="At weight 0.5 and with rows masked one by one, as the official code has it, the gain is smaller.",
    ),
    Claim(
        name="b",
        statement="Settings found on few tasks serve better for more tasks than task arithmetic's",
        metric="mean test accuracy of 8 tasks merged, higher is better",
        measure=_measure_transfer,
        baselines=tuple(f"task arithmetic, tuned on {tasks} tasks" for tasks in (3, 4, 8)),
        inequalities=(
            Inequality(
                "breadcrumbs >= task arithmetic + 0.02, mean of tuned on 3 and on 4 tasks",
                lambda values: _transferred(values, "breadcrumbs") >= _transferred(values, "task arithmetic") + 0.02,
                over="the mean",
            ),
        ),
        config={
            "tasks": 8,
            "finetune_steps": 150,
            "few": [3, 4],
            "weights": [step / 10 for step in range(1, 11)],
            "densities": [0.1, 0.15, 0.2, 0.3, 0.5],
            "gammas": [0.01, 0.05],
        },
        quick={"finetune_steps": 5, "weights": [0.3, 0.9], "densities": [0.15], "gammas": [0.01]},
        note="With each tuned on all 8 tasks the two are about as good (within 0.01).",
    ),
)

"""The claims on projected digits: sums and negations of linear task vectors interfere less than those of ordinary ones."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean
from typing import NamedTuple

from taskloom.methods.claim import Claim, Inequality, Trial, Values
from taskloom.methods.merging.projected_digits import SplitName
from taskloom.methods.merging.tangent_arithmetic.disentanglement import disentanglement_error
from taskloom.methods.merging.tangent_arithmetic.experiment import (
    ARMS,
    LINEAR,
    ORDINARY,
    Models,
    build_models,
    kernel_network,
    kernel_points,
)
from taskloom.methods.merging.tangent_arithmetic.ntk import local_energy, ntk_matrix
from taskloom.methods.merging.tangent_arithmetic.search import Control, search_alpha
from taskloom.methods.threads import one_thread

_ALPHAS = (0.3, 0.5, 1.0)
_PAIR_ALPHAS = (1.0, 2.0)
_SPLITS: tuple[SplitName, SplitName] = ("val", "test")


def _models(trial: Trial) -> Models:
    config = trial.config
    return build_models(trial.seed, config["tasks"], config["pretrain_steps"], config["finetune_steps"])


def _grid(alphas: int) -> list[float]:
    return [step / (alphas - 1) for step in range(alphas)]


@one_thread()
def _measure_addition(trial: Trial) -> Values:
    models, values = _models(trial), dict[str, float]()
    tasks = range(trial.config["tasks"])
    for place, arm in enumerate(ARMS):
        total = models.arms[arm].total
        own = models.single_task(arm, "test")
        on_validation = models.accuracies(arm, total, tasks, "val")
        with warnings.catch_warnings():
            # A quick run's vectors may be worth nothing; the alpha is among the values.
            warnings.filterwarnings("ignore", message="search_alpha: alpha 0 won")
            alpha, _ = search_alpha(on_validation, _grid(trial.config["alphas"]), models.single_task(arm, "val"))
        on_test = models.accuracies(arm, total, tasks, "test")
        values[f"single task, {arm}"] = fmean(own)
        values[f"sum at the chosen alpha, {arm}"] = fmean(on_test(alpha))
        values[f"sum at the chosen alpha, {arm}, normalised"] = fmean(got / unit for got, unit in zip(on_test(alpha), own, strict=True))
        values[f"sum at alpha 1, {arm}"] = fmean(on_test(1.0))
        values[f"chosen alpha, {arm}"] = alpha
        trial.progress((place + 1) / len(ARMS))
    return values


@one_thread()
def _measure_interference(trial: Trial) -> Values:
    models, values = _models(trial), dict[str, float]()
    tasks = range(trial.config["tasks"])
    inputs = [[task.splits["test"].inputs] for task in models.digits.tasks]
    for place, arm in enumerate((ORDINARY, LINEAR)):
        vectors = [models.arms[arm].vectors[task] for task in tasks]
        for alpha in _ALPHAS:
            error = disentanglement_error(models.edited(arm, tasks), vectors, inputs, [alpha] * len(tasks))
            values[f"all tasks at alpha {alpha:g}, {arm}"] = float(error) / len(tasks)
        pairs = [(first, second) for first, second in combinations(tasks, 2)]
        for alpha in _PAIR_ALPHAS:
            errors = [
                disentanglement_error(models.edited(arm, pair), [vectors[task] for task in pair], [inputs[task] for task in pair], alpha)
                for pair in pairs
            ]
            values[f"pairs at ({alpha:g}, {alpha:g}), {arm}"] = fmean(map(float, errors)) / 2
        trial.progress((place + 1) / 2)
    return values


class _Forgotten(NamedTuple):
    """Test accuracies after a negation: of the task to be forgotten, and the mean of the others'."""

    target: float
    control: float


def _negated(models: Models, arm: str, target: int, grids: Sequence[Sequence[float]], floor: float) -> list[_Forgotten]:
    """For each grid, what the negation of a task leaves at the alpha that forgets most on validation data."""
    tasks, vector = range(len(models.digits.tasks)), -models.arms[arm].vectors[target]
    on_validation, on_test = (models.accuracies(arm, vector, tasks, split) for split in _SPLITS)

    def others(accuracies: list[float]) -> float:
        return fmean(accuracy for task, accuracy in enumerate(accuracies) if task != target)

    control = Control(lambda alpha: others(on_validation(alpha)), floor * others(on_validation(0.0)))
    found = []
    for grid in grids:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="search_alpha: alpha 0 won")
            alpha, _ = search_alpha(lambda alpha: on_validation(alpha)[target], grid, constraint=control, goal="min")
        found.append(_Forgotten(on_test(alpha)[target], others(on_test(alpha))))
    return found


@one_thread()
def _measure_negation(trial: Trial) -> Values:
    config, models = trial.config, _models(trial)
    tasks = range(config["tasks"])
    base = models.accuracies(ORDINARY, models.arms[ORDINARY].total, tasks, "test")(0.0)
    values = {"target, base": fmean(base)}
    for place, arm in enumerate(ARMS):
        grids = [_grid(config["alphas"]), _grid(config["coarse alphas"])]
        fine, coarse = zip(*(_negated(models, arm, target, grids, config["control"]) for target in tasks), strict=True)
        values[f"target, {arm}"] = fmean(one.target for one in fine)
        values[f"control, {arm}"] = fmean(one.control for one in fine)
        values[f"target, half the tasks, coarse alphas, {arm}"] = fmean(one.target for one in coarse[::2])
        trial.progress((place + 1) / len(ARMS))
    return values


@one_thread()
def _measure_localisation(trial: Trial) -> Values:
    config, values = trial.config, dict[str, float]()
    points, groups = kernel_points(trial.seed, config["tasks"], config["points"])
    for place, (name, steps) in enumerate((("random weights", 0), ("pre-trained weights", config["pretrain_steps"]))):
        network = kernel_network(trial.seed, config["tasks"], config["width"], steps, config["projections"])
        shares = local_energy(ntk_matrix(network, points), groups).shares[: config["top"], 0]
        values[f"mean |2s - 1|, {name}"] = float((2 * shares - 1).abs().mean())
        trial.progress((place + 1) / 2)
    return values


def _gain(values: Values, arm: str, by: float) -> bool:
    return values[f"{arm}, {LINEAR}"] >= values[f"{arm}, {ORDINARY}"] + by


def _less(values: Values, arm: str, by: float) -> bool:
    return values[f"{arm}, {LINEAR}"] <= values[f"{arm}, {ORDINARY}"] - by


_SIZE = {"tasks": 8, "pretrain_steps": 4, "finetune_steps": 150}
_QUICK = {"tasks": 3, "finetune_steps": 4}

CLAIMS = (
    Claim(
        name="C1",
        statement="A sum of linear task vectors keeps more of every task than a sum of ordinary ones",
        metric="mean test accuracy of 8 tasks, higher is better; and the alpha chosen on validation data",
        measure=_measure_addition,
        baselines=tuple(f"{what}, {ORDINARY}" for what in ("single task", "sum at the chosen alpha", "sum at alpha 1", "chosen alpha")),
        inequalities=(
            Inequality("at the chosen alpha: linear >= ordinary + 0.02", lambda values: _gain(values, "sum at the chosen alpha", 0.02)),
            Inequality("at alpha 1: linear >= ordinary + 0.15", lambda values: _gain(values, "sum at alpha 1", 0.15)),
        ),
        config={**_SIZE, "alphas": 21},
        quick={**_QUICK, "alphas": 5},
        note="",
    ),
    Claim(
        name="C2",
        statement="Linear task vectors change fewer predictions of each other's tasks",
        metric="weight disentanglement error: share of test predictions that the other vectors change, lower is better",
        measure=_measure_interference,
        baselines=(
            *(f"all tasks at alpha {alpha:g}, {ORDINARY}" for alpha in _ALPHAS),
            *(f"pairs at ({alpha:g}, {alpha:g}), {ORDINARY}" for alpha in _PAIR_ALPHAS),
        ),
        inequalities=(
            Inequality("all tasks at alpha 1: linear <= ordinary - 0.15", lambda values: _less(values, "all tasks at alpha 1", 0.15)),
            Inequality("all tasks at alpha 0.3: linear <= ordinary - 0.02", lambda values: _less(values, "all tasks at alpha 0.3", 0.02)),
            Inequality("pairs at (2, 2): linear <= ordinary - 0.005", lambda values: _less(values, "pairs at (2, 2)", 0.005), "the mean"),
        ),
        config=_SIZE,
        quick=_QUICK,
        note="",
    ),
    Claim(
        name="C3",
        statement="The negation of a linear task vector forgets its task as far as that of an ordinary one, at a kept control",
        metric="mean test accuracy of the task to be forgotten, lower is better, and of the other tasks (control), which may lose 5%",
        measure=_measure_negation,
        baselines=(
            "target, base",
            f"target, {ORDINARY}",
            f"control, {ORDINARY}",
            f"target, half the tasks, coarse alphas, {ORDINARY}",
        ),
        inequalities=(
            Inequality("target: linear <= ordinary", lambda values: _less(values, "target", 0.0)),
            Inequality(
                "target, half the tasks, coarse alphas: linear <= ordinary",
                lambda values: _less(values, "target, half the tasks, coarse alphas", 0.0),
            ),
        ),
        config={**_SIZE, "pretrain_steps": 8, "alphas": 101, "coarse alphas": 21, "control": 0.95},
        quick={**_QUICK, "alphas": 5, "coarse alphas": 3},
        note="",
    ),
    Claim(
        name="C4",
        statement="The tangent kernel's eigenvectors keep to one task a little more after pre-training than at random weights",
        metric="mean |2s - 1| of the 20 largest eigenvectors, s the share of one of two tasks, 1 is fully local",
        measure=_measure_localisation,
        baselines=("mean |2s - 1|, random weights",),
        inequalities=(
            Inequality(
                "pre-trained > random",
                lambda values: values["mean |2s - 1|, pre-trained weights"] > values["mean |2s - 1|, random weights"],
                "the mean",
            ),
        ),
        config={"tasks": 8, "width": 64, "points": 60, "projections": 8, "pretrain_steps": 60, "top": 20},
        quick={"tasks": 2, "points": 8, "pretrain_steps": 3, "top": 5},
        note="",
    ),
)

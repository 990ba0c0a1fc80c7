"""Three claims on pairs of digits: preferences move the tasks, encoders stay alike at every width, and both pay at equal computation."""

from __future__ import annotations

from statistics import fmean
from typing import Literal

import torch
from torch.nn.functional import cosine_similarity

from taskloom.methods.channels.controllable_mtl.config import WidthConfig
from taskloom.methods.channels.controllable_mtl.deploy import export
from taskloom.methods.channels.controllable_mtl.digit_pairs import (
    CLASSES,
    TASKS,
    Batch,
    DigitPairs,
    accuracies,
    accuracy,
    build,
    train_alone,
    train_sandwich,
)
from taskloom.methods.channels.controllable_mtl.distill import last_stage
from taskloom.methods.channels.controllable_mtl.flops import count_flops
from taskloom.methods.channels.controllable_mtl.hypervolume import hypervolume
from taskloom.methods.channels.controllable_mtl.model import SlimMultiTask
from taskloom.methods.channels.controllable_mtl.search import GRID, WidthSearch
from taskloom.methods.claim import Claim, Inequality, Progress, Trial, Values
from taskloom.methods.threads import one_thread

_SHAPE = (1, 1, 8, 8)
_NARROW = GRID[0]
_PAIRS = (("A", "B"), ("B", "A"))


def _preferring(task: str, encoder: float = 1.0) -> WidthConfig:
    """The task's decoder whole, the other's narrow."""
    return WidthConfig(encoder, {one: 1.0 if one == task else _NARROW for one in TASKS})


def _alone(model: SlimMultiTask, config: WidthConfig, train: DigitPairs, test: Batch, trial: Trial, done: Progress) -> dict[str, float]:
    """The accuracies of a network that was trained at one configuration only, with as many steps and the same batches."""
    plain = export(model, config, test[0][:1].to(trial.device))
    return accuracies(train_alone(plain, train, trial.config["steps"], trial.generator(1), done, trial.seed), test)


@one_thread()
def _measure_preference(trial: Trial) -> Values:
    config = trial.config
    train, test = DigitPairs(*config["train"]), DigitPairs(*config["test"]).draw(config["pairs"], trial.generator(2))
    model = build(config["channels"], trial.seed).to(trial.device)
    settings = {task: _preferring(task) for task in TASKS}
    costs = {task: count_flops(model, setting, _SHAPE) for task, setting in settings.items()}
    if len(set(costs.values())) > 1:
        raise AssertionError(f"the configurations that are compared cost {costs}: expected the same")
    train_sandwich(model, train, config["steps"], trial.generator(1), trial.part(0, 3), gamma=0.0)
    slim = {task: accuracies(model, test, setting) for task, setting in settings.items()}
    values = {f"{task}, {preferred} preferred": slim[preferred][task] for task in TASKS for preferred in TASKS}
    for place, (preferred, setting) in enumerate(settings.items()):
        found = _alone(model, setting, train, test, trial, trial.part(1 + place, 3))
        values |= {f"{task}, {preferred} preferred, trained alone": found[task] for task in TASKS}
    return values


def _gains(task: str, other: str, margin: float, over: Literal["every seed", "the mean"]) -> Inequality:
    """A task does better by more than a margin where it is the one that is preferred."""
    own, less = f"{task}, {task} preferred", f"{task}, {other} preferred"
    return Inequality(f"{own} > {less}" + (f" + {margin}" if margin else ""), lambda values: values[own] > values[less] + margin, over)


@torch.no_grad()
def _likeness(model: SlimMultiTask, test: Batch, device: torch.device) -> float:
    """Mean cosine between the narrow encoder's features and the first channels of the whole one's."""
    x = test[0].to(device)
    narrow, whole = (last_stage(model.features(x, WidthConfig(width, dict.fromkeys(TASKS, 1.0)))) for width in (_NARROW, 1.0))
    return float(cosine_similarity(narrow.flatten(1), whole[:, : narrow.shape[1]].flatten(1)).mean())


@one_thread()
def _measure_invariance(trial: Trial) -> Values:
    config = trial.config
    train, test = DigitPairs(*config["train"]), DigitPairs(*config["test"]).draw(config["pairs"], trial.generator(2))
    narrow = [WidthConfig(_NARROW, {"A": a, "B": b}) for a in (_NARROW, 1.0) for b in (_NARROW, 1.0)]
    arms = {"no distillation": ("prefix_cos", 0.0), **{kind: (kind, None) for kind in config["kinds"]}}
    values = {}
    for place, (arm, (kind, gamma)) in enumerate(arms.items()):
        model = build(config["channels"], trial.seed).to(trial.device)
        train_sandwich(model, train, config["steps"], trial.generator(1), trial.part(place, len(arms)), gamma=gamma, kind=kind)
        values[f"cosine, {arm}"] = _likeness(model, test, trial.device)
        values[f"accuracy, {arm}"] = fmean(value for setting in narrow for value in accuracies(model, test, setting).values())
    return values


@one_thread()
def _measure_hypervolume(trial: Trial) -> Values:
    config = trial.config
    train, test = DigitPairs(*config["train"]), DigitPairs(*config["test"]).draw(config["pairs"], trial.generator(2))
    held = DigitPairs(*config["validation"]).draw(config["validation pairs"], trial.generator(3))
    chance = [1 / CLASSES] * len(TASKS)
    budgets, preferences = config["budgets"], config["preferences"]
    parts = 2 + len(budgets) * len(preferences)

    searches = {}
    for place, (arm, decoder_widths) in enumerate((("controllable", None), ("fixed decoders", (1.0,)))):
        model = build(config["channels"], trial.seed).to(trial.device)
        train_sandwich(
            model, train, config["steps"], trial.generator(1), trial.part(place, parts), gamma=None, decoder_widths=decoder_widths
        )
        loader = [(held[0].to(trial.device), {task: target.to(trial.device) for task, target in held[1].items()})]
        searches[arm] = (model, WidthSearch(model, loader, accuracy))
    model, search = searches["controllable"]
    fixed, fixed_search = searches["fixed decoders"]

    volumes: dict[str, list[float]] = {"controllable": [], "fixed decoders": [], "trained alone": []}
    spreads: list[dict[str, float]] = []
    used: dict[str, list[float]] = {"controllable": [], "fixed decoders": []}
    for turn, budget in enumerate(budgets):
        points: dict[str, list[list[float]]] = {arm: [] for arm in volumes}
        for place, preference in enumerate(preferences):
            chosen, info = search.find(preference, budget)
            used["controllable"].append(info.flops / search.full_flops)
            points["controllable"].append([*accuracies(model, test, chosen).values()])
            done = trial.part(2 + turn * len(preferences) + place, parts)
            points["trained alone"].append([*_alone(model, chosen, train, test, trial, done).values()])
        whole = best_encoder(fixed_search, budget * fixed_search.full_flops)
        used["fixed decoders"].append(fixed_search.flops(whole) / fixed_search.full_flops)
        points["fixed decoders"].append([*accuracies(fixed, test, whole).values()])
        for arm, found in points.items():
            volumes[arm].append(hypervolume(found, chance))
        columns = zip(*points["controllable"], strict=True)
        spreads.append({task: max(column) - min(column) for task, column in zip(TASKS, columns, strict=True)})

    values = {f"hypervolume, {arm}": fmean(found) for arm, found in volumes.items()}
    values |= {f"hypervolume at {budget}, {arm}": found[place] for place, budget in enumerate(budgets) for arm, found in volumes.items()}
    values |= {f"spread of {task}": fmean(spread[task] for spread in spreads) for task in TASKS}
    values |= {f"share of the operations used, {arm}": fmean(found) for arm, found in used.items()}
    return values


def best_encoder(search: WidthSearch, limit: float) -> WidthConfig:
    """The encoder's width that does best on validation data with whole decoders, within so many operations.

    There is no preference that could change them.
    """
    equal = dict.fromkeys(TASKS, 1 / len(TASKS))
    configs = [WidthConfig(width, dict.fromkeys(TASKS, 1.0)) for width in search.grid]
    feasible = [one for one in configs if search.flops(one) <= limit]
    return max(feasible, key=lambda one: (search.score(equal, one), -search.flops(one)))


# What the network with fixed decoders costs at three widths of its encoder, so that it can spend all of each budget.
_BUDGETS = [0.13, 0.32, 0.66]
_AT = ("", *(f" at {budget}" for budget in _BUDGETS))
_DATA = {"train": [0, 1200], "test": [1200, 1797], "pairs": 4000}

CLAIMS = (
    Claim(
        name="C1",
        statement="A task whose decoder is wide does better than with a narrow one, at the same operations in all",
        metric="test accuracy of a task, higher is better",
        measure=_measure_preference,
        baselines=tuple(f"{task}, {preferred} preferred, trained alone" for preferred in TASKS for task in TASKS),
        inequalities=(
            *(_gains(task, other, 0.0, "every seed") for task, other in _PAIRS),
            *(_gains(task, other, 0.02, "the mean") for task, other in _PAIRS),
        ),
        config={"channels": 48, "steps": 400, **_DATA},
        quick={"channels": 16, "steps": 5, "pairs": 200},
        note="Encoder whole, decoders 1.0 and 0.25 or the other way round, no distillation. Networks that were trained alone have the same "
        "sizes, and saw one configuration only.",
    ),
    Claim(
        name="C2",
        statement="With distillation a narrow encoder's features are closer to those of the whole one, at no loss of accuracy",
        metric="mean cosine of features, and mean test accuracy, of the encoder at width 0.25; higher is better",
        measure=_measure_invariance,
        baselines=("cosine, no distillation", "accuracy, no distillation"),
        inequalities=(
            Inequality(
                "cosine, prefix_cos > cosine, no distillation",
                lambda values: values["cosine, prefix_cos"] > values["cosine, no distillation"],
            ),
            Inequality(
                "cosine, prefix_cos > cosine, no distillation + 0.01",
                lambda values: values["cosine, prefix_cos"] > values["cosine, no distillation"] + 0.01,
                "the mean",
            ),
            Inequality(
                "accuracy, prefix_cos > accuracy, no distillation - 0.015",
                lambda values: values["accuracy, prefix_cos"] > values["accuracy, no distillation"] - 0.015,
                "the mean",
            ),
        ),
        config={"channels": 16, "steps": 500, "kinds": ["prefix_cos", "prefix_mse", "attention"], **_DATA},
        quick={"steps": 5, "pairs": 200},
        note="Accuracy is the mean of both tasks over four settings of the decoders. A gain of accuracy is not claimed at this size. The "
        "distances are inferred; the paper's own is not known.",
    ),
    Claim(
        name="C3",
        statement="Over preferences at equal operations, a controllable network covers more than one whose decoders are fixed",
        metric="hypervolume of both tasks' test accuracies above chance, higher is better; spreads over preferences; shares of operations",
        measure=_measure_hypervolume,
        baselines=tuple(f"hypervolume{at}, {arm}" for at in _AT for arm in ("fixed decoders", "trained alone")),
        inequalities=(
            Inequality(
                "hypervolume, controllable > hypervolume, fixed decoders",
                lambda values: values["hypervolume, controllable"] > values["hypervolume, fixed decoders"],
                "the mean",
            ),
        ),
        config={
            "channels": 48,
            "steps": 400,
            "train": [0, 1000],
            "validation": [1000, 1200],
            "validation pairs": 1000,
            "test": [1200, 1797],
            "pairs": 4000,
            "budgets": _BUDGETS,
            "preferences": [[0.9, 0.1], [0.5, 0.5], [0.1, 0.9]],
        },
        quick={"channels": 16, "steps": 5, "pairs": 200, "validation pairs": 100, "budgets": [0.66]},
        note="One point per preference and budget; a network with fixed decoders has one per budget, as preferences change nothing in it. "
        "Trained alone: a network of its own, with as many steps, for every point of the controllable one. Budgets are shares of the whole "
        "network's operations.",
    ),
)

"""Task negation: unlearn one task of a model that knows eight, and keep the other seven."""

from __future__ import annotations

from statistics import fmean

import torch
from torch import Tensor

from taskloom.merge import TaskVector
from taskloom.methods.claim import Claim, Inequality, Trial, Values
from taskloom.methods.merging.atlas.claim_training import build_digits, compose, draw, task_vectors, train
from taskloom.methods.merging.atlas.coefficients import Granularity
from taskloom.methods.merging.atlas.losses import negation_loss
from taskloom.methods.merging.atlas.selection import Negation
from taskloom.methods.merging.projected_digits import ProjectedDigits, SplitName, State, task_name
from taskloom.methods.threads import one_thread


def _pair(digits: ProjectedDigits, state: State, task: int, split: SplitName) -> tuple[float, float]:
    """Accuracy on the target, and the mean of the seven others."""
    others = [other for other in range(len(digits.tasks)) if other != task]
    return digits.accuracy(state, task, split), digits.mean_accuracy(state, split, others)


def _searched(digits: ProjectedDigits, vector: TaskVector, task: int, largest: float, values: int) -> State:
    """The multiple of the vector taken off that unlearns most on validation data with the control within the same bound."""
    base_target, base_control = _pair(digits, digits.base, task, "val")
    best, lowest = digits.base, base_target
    for place in range(1, values + 1):
        state = vector.apply_to(digits.base, -largest * place / values)
        target, control = _pair(digits, state, task, "val")
        if target < lowest and control >= 0.95 * base_control:
            best, lowest = state, target
    return best


def _learned(digits: ProjectedDigits, vector: TaskVector, task: int, trial: Trial, granularity: Granularity = "block") -> State:
    config = trial.config
    generator = trial.generator(task)
    others = [other for other in range(len(digits.tasks)) if other != task]
    heads = [digits.head(other) for other in range(len(digits.tasks))]
    atlas = compose(digits, {task_name(task): vector}, granularity=granularity)
    negation = Negation(atlas.coef, *_pair(digits, digits.base, task, "val"))

    def loss(step: int) -> Tensor:
        target = draw(digits.tasks[task].splits["val"], config["batch"] * len(others), generator)
        control = [draw(digits.tasks[other].splits["val"], config["batch"], generator) for other in others]
        features = atlas(torch.cat([target[0], *(inputs for inputs, _ in control)]))
        own, *parts = features.split([len(target[1]), *(len(labels) for _, labels in control)])
        logits = torch.cat([heads[other](part) for other, part in zip(others, parts, strict=True)])
        return negation_loss((heads[task](own), target[1]), (logits, torch.cat([labels for _, labels in control])))

    def check() -> bool:
        return negation.update(*_pair(digits, atlas.materialize(), task, "val"))

    train(atlas, loss, steps=config["steps"], lr=config["lr"], every=config["every"], check=check)
    negation.restore()
    return atlas.materialize()


def _task_values(digits: ProjectedDigits, task: int, trial: Trial) -> dict[str, float]:
    config = trial.config
    vector = task_vectors(digits)[task_name(task)]
    states = {
        "base": digits.base,
        "searched coefficient": _searched(digits, vector, task, config["largest"], config["coefficients"]),
        "learned coefficient": _learned(digits, vector, task, trial, "vector"),
        "aTLAS": _learned(digits, vector, task, trial),
    }
    pairs = {arm: _pair(digits, state, task, "test") for arm, state in states.items()}
    return {f"{part}, {arm}": pair[place] for place, part in enumerate(("target", "control")) for arm, pair in pairs.items()}


@one_thread()
def _measure(trial: Trial) -> Values:
    digits = build_digits(trial.seed, trial.config["finetune_steps"], trial.config["pretrain_steps"])
    trial.progress(0.1)
    found = [_task_values(digits, task, trial) for task in trial.config["tasks"]]
    return {arm: fmean(values[arm] for values in found) for arm in found[0]}


NEGATION = Claim(
    name="Task negation",
    statement="A coefficient for each block of a task's own vector unlearns more of it, with the other tasks kept",
    metric="test accuracy: target lower, control higher is better",
    measure=_measure,
    baselines=tuple(f"{part}, {arm}" for part in ("target", "control") for arm in ("base", "searched coefficient", "learned coefficient")),
    inequalities=(
        Inequality(
            "target: aTLAS <= searched coefficient - 0.02",
            lambda values: values["target, aTLAS"] <= values["target, searched coefficient"] - 0.02,
        ),
        Inequality("control: aTLAS >= 0.95 * base", lambda values: values["control, aTLAS"] >= 0.95 * values["control, base"]),
    ),
    config={
        "pretrain_steps": 20,
        "finetune_steps": 150,
        "tasks": [0, 3, 6],
        "steps": 150,
        "batch": 8,
        "lr": 0.05,
        "every": 5,
        "largest": 3.0,
        "coefficients": 20,
    },
    quick={"finetune_steps": 10, "tasks": [0], "steps": 4, "every": 2, "coefficients": 3},
    note=(
        "Targets are tasks 0, 3 and 6, controls the mean of the seven others. The base is pre-trained for 20 steps instead of 4: after 4 "
        "it knows a task so little that either way unlearns it wholly. The coefficient is searched up to 3, beyond the usual 1."
    ),
)

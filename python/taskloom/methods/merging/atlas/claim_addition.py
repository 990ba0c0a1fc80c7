"""Task addition: one set of coefficients for eight tasks, learned on their validation splits."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import reduce

from torch import Tensor

from taskloom.merge import TaskVector
from taskloom.methods.claim import Claim, Inequality, Trial, Values
from taskloom.methods.merging.atlas.claim_training import build_digits, compose, draw, task_vectors, train
from taskloom.methods.merging.atlas.coefficients import Coefficients
from taskloom.methods.merging.atlas.losses import Batch, Encoder, multi_task_loss
from taskloom.methods.merging.atlas.selection import BestCoefficients, normalised_accuracy
from taskloom.methods.merging.projected_digits import ProjectedDigits, State, task_name
from taskloom.methods.threads import one_thread


def addition_loss(digits: ProjectedDigits) -> Callable[[Encoder, Mapping[str, Batch]], Tensor]:
    """The loss over all tasks, with the set-up's heads."""
    return multi_task_loss({task_name(task): digits.head(task) for task in range(len(digits.tasks))})


def learn_addition(digits: ProjectedDigits, atlas: Coefficients, trial: Trial) -> State:
    """The encoder whose coefficients did best on the validation splits, by mean normalised accuracy."""
    generator = trial.generator(1)
    loss = addition_loss(digits)
    finetuned = [digits.accuracy(tuned, task, "val") for task, tuned in enumerate(digits.tuned)]
    best = BestCoefficients(atlas.coef, normalised_accuracy(digits.accuracies(digits.base, "val"), finetuned))

    def check() -> bool:
        best.update(normalised_accuracy(digits.accuracies(atlas.materialize(), "val"), finetuned))
        return True

    def step_loss(step: int) -> Tensor:
        drawn = {task_name(place): draw(task.splits["val"], trial.config["batch"], generator) for place, task in enumerate(digits.tasks)}
        return loss(atlas, drawn)

    train(atlas, step_loss, steps=trial.config["steps"], lr=trial.config["lr"], every=trial.config["every"], check=check)
    best.restore()
    return atlas.materialize()


def search_addition(digits: ProjectedDigits, vector: TaskVector, values: int) -> State:
    """Task arithmetic with the coefficient in (0, 1] that does best on the validation splits."""
    states = [vector.apply_to(digits.base, (place + 1) / values) for place in range(values)]
    return max(states, key=lambda state: digits.mean_accuracy(state, "val"))


@one_thread()
def _measure(trial: Trial) -> Values:
    digits = build_digits(trial.seed, trial.config["finetune_steps"])
    vectors = task_vectors(digits)
    trial.progress(0.4)
    states = {
        "base": digits.base,
        "searched scalar": search_addition(digits, reduce(operator.add, vectors.values()), trial.config["coefficients"]),
        "learned isotropic": learn_addition(digits, compose(digits, vectors, granularity="vector"), trial),
        "aTLAS": learn_addition(digits, compose(digits, vectors), trial),
    }
    accuracies = {arm: digits.mean_accuracy(state) for arm, state in states.items()}
    return {**accuracies, "eight fine-tuned models": sum(digits.single_task) / len(digits.single_task)}


ADDITION_CONFIG = {"finetune_steps": 150, "steps": 200, "batch": 16, "lr": 0.02, "every": 25, "coefficients": 20}
ADDITION_QUICK = {"finetune_steps": 10, "steps": 4, "every": 2, "coefficients": 3}

ADDITION = Claim(
    name="Task addition",
    statement="A coefficient for each vector and block merges better than one for all, or one for each vector",
    metric="test accuracy, 8 tasks, higher is better",
    measure=_measure,
    baselines=("base", "searched scalar", "learned isotropic", "eight fine-tuned models"),
    inequalities=(
        Inequality("aTLAS >= searched scalar + 0.03", lambda values: values["aTLAS"] >= values["searched scalar"] + 0.03),
        Inequality("aTLAS >= learned isotropic + 0.03", lambda values: values["aTLAS"] >= values["learned isotropic"] + 0.03),
    ),
    config=ADDITION_CONFIG,
    quick=ADDITION_QUICK,
    note="64 coefficients learned on validation data against 20 values tried there; a merge stays below the eight fine-tuned models.",
)

"""Test-time adaptation: coefficients learned from unlabelled test inputs, of a task whose own vector is not in the pool."""

from __future__ import annotations

from statistics import fmean

import torch
from torch import Tensor

from taskloom.methods.claim import Claim, Inequality, Trial, Values
from taskloom.methods.merging.atlas.claim_training import build_digits, compose, task_name, task_vectors, train
from taskloom.methods.merging.atlas.few_shot import pool_without
from taskloom.methods.merging.atlas.losses import ufm_loss
from taskloom.methods.merging.atlas.trusted import TrustedBatches, TrustedSamples, select_trusted
from taskloom.methods.merging.projected_digits import ProjectedDigits, State, load_encoder
from taskloom.methods.threads import one_thread


def _strong_view(inputs: Tensor, noise: float, dropped: float, generator: torch.Generator) -> Tensor:
    """Inputs with more noise, and some of their coordinates zeroed: their crops and flips mean nothing after a rotation."""
    kept = torch.rand(inputs.shape, generator=generator) >= dropped
    return (inputs + noise * torch.randn(inputs.shape, generator=generator)) * kept


@torch.no_grad()
def _probabilities(digits: ProjectedDigits, state: State, task: int) -> Tensor:
    probabilities: Tensor = digits.head(task)(load_encoder(state)(digits.tasks[task].splits["test"].inputs)).softmax(1)
    return probabilities


def _adapted(digits: ProjectedDigits, task: int, samples: TrustedSamples, trial: Trial, partitions: int) -> State:
    config = trial.config
    inputs, head = digits.tasks[task].splits["test"].inputs, digits.head(task)
    pool = pool_without(task_vectors(digits), task_name(task))
    atlas = compose(digits, pool, partitions=partitions, partition_seed=trial.seed)
    batches = TrustedBatches(samples.trusted, config["batch"], seed=trial.seed)
    drawn = (torch.tensor(rows) for _ in range(config["epochs"]) for rows in batches)
    generator = trial.generator(task)

    def loss(step: int) -> Tensor:
        rows = next(drawn)
        views = torch.cat([inputs[rows], _strong_view(inputs[rows], config["noise"], config["dropped"], generator)])
        weak, strong = head(atlas(views)).chunk(2)
        return ufm_loss(weak, strong, samples.pseudo[rows], samples.trusted[rows], config["threshold"])

    train(atlas, loss, steps=config["epochs"] * len(batches), lr=config["lr"], cosine=True)
    return atlas.materialize()


def _task_values(digits: ProjectedDigits, task: int, trial: Trial) -> dict[str, float]:
    samples = select_trusted(_probabilities(digits, digits.base, task))
    right = samples.pseudo == digits.tasks[task].splits["test"].labels
    values = {"base": digits.accuracy(digits.base, task)}
    for k in trial.config["partitions"]:
        state = _adapted(digits, task, samples, trial, k)
        values[f"adapted, K={k}"] = digits.accuracy(state, task)
        confident = _probabilities(digits, state, task).amax(1) > trial.config["threshold"]
        values[f"others above the threshold, K={k}"] = float(confident[~samples.trusted].double().mean())
    return {**values, "trusted labels that are right": float(right[samples.trusted].double().mean())}


@one_thread()
def _measure(trial: Trial) -> Values:
    digits = build_digits(trial.seed, trial.config["finetune_steps"])
    trial.progress(0.1)
    found = [_task_values(digits, task, trial) for task in trial.config["tasks"]]
    return {arm: fmean(values[arm] for values in found) for arm in found[0]}


ADAPTATION = Claim(
    name="Test-time adaptation",
    statement="Coefficients learned without labels, from other tasks' vectors, do not harm the base and help it",
    metric="mean test accuracy of tasks 0, 3 and 6, higher is better; shares of samples",
    measure=_measure,
    baselines=("base",),
    inequalities=(
        Inequality("adapted, K=1 >= base", lambda values: values["adapted, K=1"] >= values["base"]),
        Inequality("adapted, K=10 >= base", lambda values: values["adapted, K=10"] >= values["base"]),
    ),
    config={
        "finetune_steps": 150,
        "tasks": [0, 3, 6],
        "partitions": [1, 10],
        "epochs": 10,
        "batch": 64,
        "lr": 0.05,
        "threshold": 0.99,
        "noise": 0.2,
        "dropped": 0.2,
    },
    quick={"finetune_steps": 10, "tasks": [0], "epochs": 1},
    note=(
        "Adapted on the test inputs without their labels, as in the paper, with the few-shot rate and the paper's threshold; the last "
        "coefficients are taken. Where no other sample gets above the threshold, all that is learned comes from the trusted ones."
    ),
)

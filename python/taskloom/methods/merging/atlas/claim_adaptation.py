"""Test-time adaptation: coefficients learned from unlabelled test inputs, of a task whose own vector is not in the pool."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

import torch
from torch import Tensor

from taskloom.methods.claim import Claim, Inequality, Trial, Values
from taskloom.methods.merging.atlas.claim_training import build_digits, compose, task_vectors, train
from taskloom.methods.merging.atlas.few_shot import pool_without
from taskloom.methods.merging.atlas.losses import ufm_loss
from taskloom.methods.merging.atlas.trusted import TrustedBatches, TrustedSamples, select_trusted
from taskloom.methods.merging.projected_digits import ProjectedDigits, State, load_encoder, task_name
from taskloom.methods.threads import one_thread


def _strong_view(inputs: Tensor, noise: float, dropped: float, generator: torch.Generator) -> Tensor:
    """Inputs with more noise, and some of their coordinates zeroed: their crops and flips mean nothing after a rotation."""
    kept = torch.rand(inputs.shape, generator=generator) >= dropped
    return (inputs + noise * torch.randn(inputs.shape, generator=generator)) * kept


@torch.no_grad()
def _probabilities(digits: ProjectedDigits, state: State, task: int) -> Tensor:
    probabilities: Tensor = digits.head(task)(load_encoder(state)(digits.tasks[task].splits["test"].inputs)).softmax(1)
    return probabilities


def _adapted(digits: ProjectedDigits, task: int, samples: TrustedSamples, trial: Trial, partitions: int, threshold: float) -> State:
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
        return ufm_loss(weak, strong, samples.pseudo[rows], samples.trusted[rows], threshold)

    train(atlas, loss, steps=config["epochs"] * len(batches), lr=config["lr"], cosine=True)
    return atlas.materialize()


def _task_values(digits: ProjectedDigits, task: int, trial: Trial, arms: Mapping[str, tuple[int, float]]) -> dict[str, float]:
    """Accuracy of the base and of each arm with its K and threshold, and what there was to learn from."""
    samples = select_trusted(_probabilities(digits, digits.base, task))
    right = samples.pseudo == digits.tasks[task].splits["test"].labels
    values, confident = {"base": digits.accuracy(digits.base, task)}, 0.0
    for arm, (partitions, threshold) in arms.items():
        state = _adapted(digits, task, samples, trial, partitions, threshold)
        values[arm] = digits.accuracy(state, task)
        above = _probabilities(digits, state, task)[~samples.trusted].amax(1) > 0.99
        confident = max(confident, float(above.double().mean()))
    values["others above 0.99 (share)"] = confident
    return {**values, "trusted labels right (share)": float(right[samples.trusted].double().mean())}


def _means(digits: ProjectedDigits, trial: Trial, arms: Mapping[str, tuple[int, float]]) -> dict[str, float]:
    found = [_task_values(digits, task, trial, arms) for task in trial.config["tasks"]]
    return {arm: fmean(values[arm] for values in found) for arm in found[0]}


@one_thread()
def _measure(trial: Trial) -> Values:
    config = trial.config
    weak = build_digits(trial.seed, config["finetune_steps"])
    found = _means(weak, trial, {f"adapted, K={k}": (k, config["threshold"]) for k in config["partitions"]})
    trial.progress(0.6)
    better = build_digits(trial.seed, config["finetune_steps"], config["more_pretrain_steps"])
    arms = {"adapted, K=1": (1, config["threshold"]), f"adapted, K=1, threshold {config['low_threshold']}": (1, config["low_threshold"])}
    return found | {f"better base: {arm}": value for arm, value in _means(better, trial, arms).items()}


ADAPTATION = Claim(
    name="Test-time adaptation",
    statement="Coefficients of other tasks' vectors, learned without labels, make a weak base better",
    metric="test accuracy, tasks 0, 3, 6, higher is better",
    measure=_measure,
    baselines=("base", "better base: base"),
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
        "low_threshold": 0.8,
        "more_pretrain_steps": 20,
        "noise": 0.2,
        "dropped": 0.2,
    },
    quick={"finetune_steps": 10, "tasks": [0], "epochs": 1},
    note=(
        "Adapted on the test inputs without their labels, as in the paper, with the few-shot rate and the paper's threshold; the last "
        "coefficients are taken, as there are no labels to choose by. All is learned from the trusted samples where no other is above the "
        "threshold. A base that knows the tasks, pre-trained for 20 steps, gains next to nothing, also with a lower threshold."
    ),
)

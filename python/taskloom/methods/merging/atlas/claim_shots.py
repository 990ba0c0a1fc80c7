"""Few shots: four examples a class of a task whose own vector is not in the pool."""

from __future__ import annotations

from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional

from taskloom.methods.claim import Claim, Inequality, Trial, Values
from taskloom.methods.merging.atlas.claim_training import Pool, build_digits, compose, task_vectors, train
from taskloom.methods.merging.atlas.coefficients import Granularity
from taskloom.methods.merging.atlas.few_shot import choose_shots, pool_without
from taskloom.methods.merging.atlas.losses import Batch
from taskloom.methods.merging.projected_digits import ProjectedDigits, State, load_encoder, task_name
from taskloom.methods.threads import one_thread


def take_shots(digits: ProjectedDigits, task: int, k: int, seed: int) -> Batch:
    """Inputs and labels of k training examples a class."""
    split = digits.tasks[task].splits["train"]
    chosen = choose_shots(split.labels, k, seed=seed)
    return split.inputs[chosen], split.labels[chosen]


def learn_shots(
    digits: ProjectedDigits, pool: Pool, task: int, shots: Batch, trial: Trial, partitions: int = 1, granularity: Granularity = "block"
) -> State:
    """The encoder with coefficients trained on all shots at once."""
    head = digits.head(task)
    atlas = compose(digits, pool, granularity=granularity, partitions=partitions, partition_seed=trial.seed)

    def loss(step: int) -> Tensor:
        return functional.cross_entropy(head(atlas(shots[0])), shots[1])

    train(atlas, loss, steps=trial.config["steps"], lr=trial.config["lr"])
    return atlas.materialize()


def _finetuned(digits: ProjectedDigits, task: int, shots: Batch, trial: Trial) -> State:
    """All weights trained on the shots."""
    encoder, head = load_encoder(digits.base), digits.head(task)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=trial.config["finetune_lr"], weight_decay=0.0)
    for _ in range(trial.config["steps"]):
        optimizer.zero_grad()
        functional.cross_entropy(head(encoder(shots[0])), shots[1]).backward()
        optimizer.step()
    return encoder.state_dict()


def _task_values(digits: ProjectedDigits, task: int, trial: Trial) -> dict[str, float]:
    pool = pool_without(task_vectors(digits), task_name(task))
    shots = take_shots(digits, task, trial.config["shots"], trial.seed)
    states = {
        "base": digits.base,
        "isotropic": learn_shots(digits, pool, task, shots, trial, granularity="vector"),
        **{f"aTLAS, K={k}": learn_shots(digits, pool, task, shots, trial, partitions=k) for k in trial.config["partitions"]},
        "all weights": _finetuned(digits, task, shots, trial),
    }
    return {arm: digits.accuracy(state, task) for arm, state in states.items()}


@one_thread()
def _measure(trial: Trial) -> Values:
    digits = build_digits(trial.seed, trial.config["finetune_steps"])
    trial.progress(0.1)
    found = [_task_values(digits, task, trial) for task in trial.config["tasks"]]
    return {arm: fmean(values[arm] for values in found) for arm in found[0]}


PARTITIONS = Claim(
    name="Partitions",
    statement="More coefficients for each block adapt better to 4 shots a class, from other tasks' vectors alone",
    metric="test accuracy, tasks 0, 3, 6, higher is better",
    measure=_measure,
    baselines=("base", "isotropic", "aTLAS, K=1", "all weights"),
    inequalities=(Inequality("K=10 >= K=1 + 0.08", lambda values: values["aTLAS, K=10"] >= values["aTLAS, K=1"] + 0.08),),
    config={
        "finetune_steps": 150,
        "tasks": [0, 3, 6],
        "shots": 4,
        "partitions": [1, 10, 100],
        "steps": 60,
        "lr": 0.05,
        "finetune_lr": 1e-3,
    },
    quick={"finetune_steps": 10, "tasks": [0], "partitions": [1, 10], "steps": 3},
    note="These tasks share no structure: all weights trained on the shots do better. Not evidence for few shots over fine-tuning.",
)

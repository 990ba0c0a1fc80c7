"""The claims on projected digits: models come back from one vector and a bit each; a consensus needs no tuned factor."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from taskloom.archive import open_archive
from taskloom.methods.claim import Claim, Inequality, Trial, Values
from taskloom.methods.merging import projected_digits
from taskloom.methods.merging.projected_digits import ProjectedDigits, SplitName, State
from taskloom.methods.merging.tall_masks import (
    TallArchive,
    magnitude_masks,
    merge_consensus,
    multi_task_vector,
    restore_task,
)

_KS = (0, 1, 2, 3)


@lru_cache(maxsize=3)
def _digits(seed: int, tasks: int, finetune_steps: int) -> ProjectedDigits:
    """The set-up of a seed, which both claims look at."""
    return projected_digits.build(seed, tasks=tasks, finetune_steps=finetune_steps)


class _Models:
    """The set-up's models where the method computes; accuracies are taken on the CPU."""

    def __init__(self, trial: Trial) -> None:
        config = trial.config
        self.digits = _digits(trial.seed, config["tasks"], config["finetune_steps"])
        self.base = self._moved(self.digits.base, trial)
        self.tuned = {task: self._moved(state, trial) for task, state in self.digits.tuned_by_task.items()}
        self._places = {task: place for place, task in enumerate(self.tuned)}

    @staticmethod
    def _moved(state: State, trial: Trial) -> State:
        return {name: values.to(trial.device) for name, values in state.items()}

    def accuracy(self, task: str, state: Mapping[str, Tensor], split: SplitName = "test") -> float:
        """Of a state on a task."""
        return self.digits.accuracy({name: values.cpu() for name, values in state.items()}, self._places[task], split)

    def validate(self, task: str, state: dict[str, Tensor]) -> float:
        """What thresholds are picked by."""
        return self.accuracy(task, state, "val")

    def mean_accuracy(self, state: Mapping[str, Tensor], split: SplitName = "test") -> float:
        """Of one state on all tasks."""
        return fmean(self.accuracy(task, state, split) for task in self.tuned)

    def archive(self, **settings: Any) -> TallArchive:
        """With thresholds picked by validation."""
        return TallArchive.build(self.base, self.tuned, evaluate=self.validate, **settings)

    def restored(self, archive: TallArchive) -> float:
        """Mean accuracy of the archive's tasks."""
        return fmean(self.accuracy(task, archive.state_dict(task)) for task in archive.tasks)


def _alphas(config: Mapping[str, Any]) -> list[float]:
    return [step / config["alphas"] for step in range(1, config["alphas"] + 1)]


def _tuned_consensus(models: _Models, archive: TallArchive, k: int, config: Mapping[str, Any]) -> float:
    """Test accuracy of a consensus at the alpha that does best on validation data; k = 0 is task arithmetic."""

    def merged(alpha: float) -> State:
        return merge_consensus(models.base, models.tuned, archive.masks, k=k, lambda_=alpha)

    best = max(_alphas(config), key=lambda alpha: models.mean_accuracy(merged(alpha), "val"))
    return models.mean_accuracy(merged(best))


def _measure_restored(trial: Trial) -> Values:
    models = _Models(trial)
    trial.progress(0.5)
    values = {"single-task models": fmean(models.digits.single_task)}
    archive = models.archive()
    values["TALL, sum"] = models.restored(archive)
    values["TALL, TIES"] = models.restored(models.archive(method="ties"))
    trial.progress(0.8)
    tau = multi_task_vector(models.base, models.tuned)
    masks = magnitude_masks(models.base, models.tuned, trial.config["share"])
    values["magnitude masking"] = fmean(models.accuracy(task, restore_task(models.base, tau, mask)) for task, mask in masks.items())
    values["task arithmetic, alpha tuned"] = _tuned_consensus(models, archive, 0, trial.config)
    return values


def _measure_size(trial: Trial) -> Values:
    # How long the models were trained changes no size.
    digits = projected_digits.build(trial.seed, tasks=trial.config["tasks"], finetune_steps=1)
    tuned = digits.tuned_by_task
    archive = TallArchive.build(digits.base, tuned)
    bits = 8 / archive.info.parameters
    with TemporaryDirectory() as folder:
        files = open_archive(archive.save(Path(folder) / "archive")).nbytes
    return {
        "separate checkpoints": bits * sum(values.nbytes for state in tuned.values() for values in state.values()),
        "archive, with headers": bits * files,
        "archive": bits * archive.nbytes,
        "64 + T": 64 + len(tuned),
    }


def _measure_consensus(trial: Trial) -> Values:
    models = _Models(trial)
    trial.progress(0.5)
    archive = models.archive()
    trial.progress(0.7)
    values = {}
    for k in _KS:
        merged = merge_consensus(models.base, models.tuned, archive.masks, k=k, lambda_=1.0)
        values[f"k = {k}, alpha 1"] = models.mean_accuracy(merged)
    for k in (0, 2):
        values[f"k = {k}, alpha tuned"] = _tuned_consensus(models, archive, k, trial.config)
    return values


_SETTINGS = {"tasks": 8, "finetune_steps": 150, "alphas": 10}
_QUICK = {"tasks": 3, "finetune_steps": 8, "alphas": 2}
_KINDS = ("TALL, sum", "TALL, TIES")

CLAIMS = (
    Claim(
        name="C1",
        statement="Every task comes back from one vector and its mask at nearly its own accuracy",
        metric="mean test accuracy of 8 tasks, higher is better",
        measure=_measure_restored,
        baselines=("single-task models", "magnitude masking", "task arithmetic, alpha tuned"),
        inequalities=(
            Inequality("TALL >= 0.985 * single-task models", lambda v: min(v[kind] for kind in _KINDS) >= 0.985 * v["single-task models"]),
            Inequality("TALL >= magnitude masking + 0.02", lambda v: min(v[kind] for kind in _KINDS) >= v["magnitude masking"] + 0.02),
            Inequality(
                "TALL >= task arithmetic + 0.06", lambda v: min(v[kind] for kind in _KINDS) >= v["task arithmetic, alpha tuned"] + 0.06
            ),
        ),
        config={**_SETTINGS, "share": 0.1},
        quick=_QUICK,
        note="Thresholds and alpha are picked on validation data. The paper's models, vision transformers, were not run.",
    ),
    Claim(
        name="C2",
        statement="An archive of T tasks takes 64 + T bits per parameter, and the headers of its files",
        metric="bits per parameter, lower is better",
        measure=_measure_size,
        baselines=("separate checkpoints",),
        inequalities=(
            Inequality("archive = 64 + T", lambda v: v["archive"] == v["64 + T"]),
            Inequality("headers below 2 bits", lambda v: 0 < v["archive, with headers"] - v["archive"] < 2),
            Inequality("archive <= 0.3 * separate", lambda v: v["archive, with headers"] <= 0.3 * v["separate checkpoints"]),
        ),
        config={"tasks": 8},
        note="All parameters are float32 and fine-tuned. The headers do not grow with the tensors' sizes.",
    ),
    Claim(
        name="C3",
        statement="Without a tuned factor, dropping entries that fewer than two tasks need makes a better merge",
        metric="mean test accuracy of 8 tasks, higher is better",
        measure=_measure_consensus,
        baselines=("k = 0, alpha 1", "k = 0, alpha tuned"),
        inequalities=(
            Inequality("k = 2 >= k = 0 + 0.08, at alpha 1", lambda v: v["k = 2, alpha 1"] >= v["k = 0, alpha 1"] + 0.08),
            Inequality("k = 1 >= k = 0, at alpha 1", lambda v: v["k = 1, alpha 1"] >= v["k = 0, alpha 1"]),
        ),
        config=_SETTINGS,
        quick=_QUICK,
        note=(
            "With alpha tuned on validation data, consensus (k = 2) is not reliably better than task arithmetic (k = 0) at this size; the "
            "paper's gain there is of large models, which were not run."
        ),
    ),
)

"""The claim on projected digits: adapters come back from shared bases nearly as good as they were, where merged factors are lost."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from statistics import fmean

from torch import Tensor

from taskloom.methods.claim import Claim, Inequality, Trial, Values
from taskloom.methods.merging import projected_digits
from taskloom.methods.merging.projected_digits import ProjectedDigits, SplitName, State
from taskloom.methods.merging.rmm.baselines import merge_products, merge_separate
from taskloom.methods.merging.rmm.fit import fit_rmm
from taskloom.methods.merging.rmm.sources import from_checkpoints
from taskloom.methods.merging.rmm.space import Factors

_LAYERS = ("layers.0.linear.weight", "layers.1.linear.weight")


def _with_deltas(digits: ProjectedDigits, task: int, deltas: Mapping[str, Tensor]) -> State:
    """The task's own model with its two matrices replaced by base + delta; biases, norms and head stay the task's."""
    state = dict(digits.tuned[task])
    for layer, delta in deltas.items():
        name = f"{layer}.weight"
        state[name] = digits.base[name] + delta.cpu()
    return state


def _mean_accuracy(digits: ProjectedDigits, deltas: Sequence[Mapping[str, Tensor]], split: SplitName) -> float:
    return fmean(digits.accuracy(_with_deltas(digits, task, own), task, split) for task, own in enumerate(deltas))


def _products(adapter: Mapping[str, Factors]) -> dict[str, Tensor]:
    return {layer: a @ b for layer, (a, b) in adapter.items()}


def _tuned_merge(digits: ProjectedDigits, shares: Mapping[str, Tensor], power: int, coefficients: Sequence[float]) -> float:
    """Test accuracy of one shared change at the coefficient that does best on validation data."""

    def scaled(coefficient: float) -> list[dict[str, Tensor]]:
        return [{layer: coefficient**power * delta for layer, delta in shares.items()}] * len(digits.tasks)

    best = max(coefficients, key=lambda coefficient: _mean_accuracy(digits, scaled(coefficient), "val"))
    return _mean_accuracy(digits, scaled(best), "test")


def _measure(trial: Trial) -> Values:
    config = trial.config
    coefficients = [step / config["coefficients"] for step in range(1, config["coefficients"] + 1)]
    digits = projected_digits.build(trial.seed, tasks=config["tasks"], finetune_steps=config["finetune_steps"])
    trial.progress(0.5)
    # The networks are trained and evaluated on the CPU; what the method itself computes runs where the trial says.
    adapters = {
        task: {layer: (a.to(trial.device), b.to(trial.device)) for layer, (a, b) in adapter.items()}
        for task, adapter in from_checkpoints(digits.base, digits.tuned_by_task, config["rank"], names=_LAYERS).items()
    }
    values = {"low-rank models": _mean_accuracy(digits, [_products(adapter) for adapter in adapters.values()], "test")}
    for p in (*config["p"], config["tasks"] - 1):
        with warnings.catch_warnings():
            # All directions take more room than the adapters; they are here to show that nothing is lost then.
            warnings.filterwarnings("ignore", message="fit_rmm: p = ")
            space = fit_rmm(adapters, p=p)
        deltas = [{layer: space.delta(task, layer) for layer in space.layers} for task in space.tasks]
        values[f"RMM p={p} (storage {space.storage_ratio:.2f})"] = _mean_accuracy(digits, deltas, "test")
    trial.progress(0.7)
    values["separate task arithmetic"] = _tuned_merge(digits, _products(merge_separate(adapters)), 2, coefficients)
    trial.progress(0.85)
    values["combined task arithmetic"] = _tuned_merge(digits, merge_products(adapters), 1, coefficients)
    return values


def _rmm(values: Values, p: int) -> float:
    return next(value for arm, value in values.items() if arm.startswith(f"RMM p={p} "))


CLAIMS = (
    Claim(
        name="C1",
        statement="A task's adapter comes back from shared bases; merged factors do not serve the tasks",
        metric="mean test accuracy of 8 tasks, higher is better",
        measure=_measure,
        baselines=("low-rank models", "separate task arithmetic", "combined task arithmetic"),
        inequalities=(
            Inequality("RMM p=2 >= separate + 0.2", lambda values: _rmm(values, 2) >= values["separate task arithmetic"] + 0.2),
            Inequality("RMM p=3 >= 0.97 * low-rank models", lambda values: _rmm(values, 3) >= 0.97 * values["low-rank models"]),
            Inequality("RMM p=1 >= separate + 0.1", lambda values: _rmm(values, 1) >= values["separate task arithmetic"] + 0.1),
            Inequality("RMM p=7 = low-rank models", lambda values: abs(_rmm(values, 7) - values["low-rank models"]) <= 1e-3),
            Inequality("RMM p=2 >= combined + 0.03", lambda values: _rmm(values, 2) >= values["combined task arithmetic"] + 0.03),
        ),
        config={"tasks": 8, "rank": 16, "p": [1, 2, 3], "finetune_steps": 150, "coefficients": 20},
        quick={"finetune_steps": 10, "coefficients": 4},
        note="Combined merging needs a full change per layer in storage; it does better than p=1.",
    ),
)

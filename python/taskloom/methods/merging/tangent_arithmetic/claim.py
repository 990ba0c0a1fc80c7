"""The claims on projected digits: sums and negations of linear task vectors interfere less than those of ordinary ones."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean

from taskloom.methods.claim import Claim, Inequality, Trial, Values
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
        total = sum(models.arms[arm].vectors.values())
        assert total != 0
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

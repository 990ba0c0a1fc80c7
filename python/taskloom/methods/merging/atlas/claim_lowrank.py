"""LoRA vectors: task addition where every vector is a low-rank adapter of the two matrices."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import reduce

from taskloom.methods.claim import Claim, Inequality, Trial, Values
from taskloom.methods.merging.atlas.claim_addition import ADDITION_CONFIG, ADDITION_QUICK, learn_addition, search_addition
from taskloom.methods.merging.atlas.claim_training import build_digits
from taskloom.methods.merging.atlas.coefficients import Granularity
from taskloom.methods.merging.atlas.lowrank import LowRankTaskVector
from taskloom.methods.merging.atlas.lowrank_model import LowRankAtlasModel
from taskloom.methods.merging.projected_digits import ProjectedDigits, load_encoder
from taskloom.methods.merging.rmm import from_checkpoints
from taskloom.methods.threads import one_thread

MATRICES = ("layers.0.linear.weight", "layers.1.linear.weight")


def low_rank_vectors(digits: ProjectedDigits, rank: int) -> dict[str, LowRankTaskVector]:
    """The fine-tunings' changes of the two matrices, cut to a rank; biases and norms stay the base's."""
    return {
        name: LowRankTaskVector({f"{layer}.weight": (right, left, 1.0) for layer, (left, right) in adapter.items()})
        for name, adapter in from_checkpoints(digits.base, digits.tuned_by_task, rank, names=MATRICES).items()
    }


def _adapter(digits: ProjectedDigits, vectors: Mapping[str, LowRankTaskVector], granularity: Granularity) -> LowRankAtlasModel:
    return LowRankAtlasModel(load_encoder(digits.base), vectors, granularity=granularity)


@one_thread()
def _measure(trial: Trial) -> Values:
    digits = build_digits(trial.seed, trial.config["finetune_steps"])
    values = {"base": digits.mean_accuracy(digits.base)}
    for place, rank in enumerate(trial.config["ranks"]):
        trial.progress((1 + place) / (1 + len(trial.config["ranks"])))
        vectors = low_rank_vectors(digits, rank)
        dense = reduce(operator.add, (vector.dense() for vector in vectors.values()))
        states = {
            "searched scalar": search_addition(digits, dense, trial.config["coefficients"]),
            "learned isotropic": learn_addition(digits, _adapter(digits, vectors, "vector"), trial),
            "aTLAS": learn_addition(digits, _adapter(digits, vectors, "block"), trial),
        }
        values |= {f"{arm}, rank {rank}": digits.mean_accuracy(state) for arm, state in states.items()}
    return values


LOW_RANK = Claim(
    name="LoRA vectors",
    statement="Low-rank task vectors with a coefficient for each vector and matrix merge better too, unless their rank is very small",
    metric="test accuracy, 8 tasks, higher is better",
    measure=_measure,
    baselines=("base", *(f"{arm}, rank {rank}" for rank in (4, 16) for arm in ("searched scalar", "learned isotropic"))),
    inequalities=(
        Inequality(
            "rank 16: aTLAS >= searched scalar + 0.02", lambda values: values["aTLAS, rank 16"] >= values["searched scalar, rank 16"] + 0.02
        ),
        Inequality(
            "rank 16: aTLAS >= learned isotropic + 0.02",
            lambda values: values["aTLAS, rank 16"] >= values["learned isotropic, rank 16"] + 0.02,
        ),
    ),
    config={**ADDITION_CONFIG, "ranks": [4, 16]},
    quick={**ADDITION_QUICK, "steps": 2},
    note="Truncated SVDs of the two matrices' changes, 16 coefficients. At rank 4 aTLAS and a searched scalar do alike.",
)

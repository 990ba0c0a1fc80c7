"""LoRA vectors: task addition where every vector is a low-rank adapter of the two matrices."""

from __future__ import annotations

import operator
from functools import reduce

from taskloom.methods.claim import Claim, Inequality, Trial, Values
from taskloom.methods.merging.atlas.claim_addition import ADDITION_CONFIG, ADDITION_QUICK, learn_addition, search_addition
from taskloom.methods.merging.atlas.claim_training import build_digits, mean_accuracy, task_name
from taskloom.methods.merging.atlas.coefficients import Granularity
from taskloom.methods.merging.atlas.lowrank import LowRankTaskVector
from taskloom.methods.merging.atlas.lowrank_model import LowRankAtlasModel
from taskloom.methods.merging.projected_digits import ProjectedDigits, load_encoder
from taskloom.methods.merging.rmm import from_checkpoints
from taskloom.methods.threads import one_thread

MATRICES = ("layers.0.linear.weight", "layers.1.linear.weight")


def low_rank_vectors(digits: ProjectedDigits, rank: int) -> dict[str, LowRankTaskVector]:
    """The fine-tunings' changes of the two matrices, cut to a rank; biases and norms stay the base's."""
    tuned = {task_name(task): state for task, state in enumerate(digits.tuned)}
    return {
        name: LowRankTaskVector({f"{layer}.weight": (right, left, 1.0) for layer, (left, right) in adapter.items()})
        for name, adapter in from_checkpoints(digits.base, tuned, rank, names=MATRICES).items()
    }


@one_thread()
def _measure(trial: Trial) -> Values:
    digits = build_digits(trial.seed, trial.config["finetune_steps"])
    everything = range(len(digits.tasks))
    values = {"base": mean_accuracy(digits, digits.base, everything)}
    for place, rank in enumerate(trial.config["ranks"]):
        trial.progress((1 + place) / (1 + len(trial.config["ranks"])))
        vectors = low_rank_vectors(digits, rank)

        def learned(granularity: Granularity) -> float:
            atlas = LowRankAtlasModel(load_encoder(digits.base), vectors, granularity=granularity)
            return mean_accuracy(digits, learn_addition(digits, atlas, trial), everything)

        dense = reduce(operator.add, (vector.dense() for vector in vectors.values()))
        values[f"searched scalar, rank {rank}"] = mean_accuracy(
            digits, search_addition(digits, dense, trial.config["coefficients"]), everything
        )
        values[f"learned isotropic, rank {rank}"] = learned("vector")
        values[f"aTLAS, rank {rank}"] = learned("block")
    return values

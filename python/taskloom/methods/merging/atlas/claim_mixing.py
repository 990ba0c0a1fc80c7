"""A budget of memory: task addition with fewer vectors than tasks, mixed from the blocks that matter most or chosen as they are."""

from __future__ import annotations

from torch import Tensor, nn

from taskloom.methods.claim import Claim, Inequality, Trial, Values
from taskloom.methods.merging.atlas.claim_addition import ADDITION_CONFIG, ADDITION_QUICK, addition_loss, learn_addition
from taskloom.methods.merging.atlas.claim_training import build_digits, compose, task_vectors
from taskloom.methods.merging.atlas.mixing import Ranking, block_gradients, mix_blocks
from taskloom.methods.merging.projected_digits import load_encoder, task_name
from taskloom.methods.threads import one_thread

_RANKINGS: dict[str, Ranking] = {"random vectors": "random", "whole vectors": "vector", "mixed blocks": "block"}


@one_thread()
def _measure(trial: Trial) -> Values:
    digits = build_digits(trial.seed, trial.config["finetune_steps"])
    vectors = task_vectors(digits)
    loss = addition_loss(digits)
    validation = {task_name(place): task.splits["val"] for place, task in enumerate(digits.tasks)}
    batches = {name: (split.inputs, split.labels) for name, split in validation.items()}

    def whole_loss(encoder: nn.Module) -> Tensor:
        return loss(encoder, batches)

    grads = block_gradients(load_encoder(digits.base), vectors, whole_loss)
    values = {"base": digits.mean_accuracy(digits.base)}
    arms = [(budget, arm) for budget in trial.config["budgets"] for arm in _RANKINGS]
    for place, (budget, arm) in enumerate(arms):
        trial.progress((1 + place) / (1 + len(arms)))
        mixed = mix_blocks(vectors, grads, budget, by=_RANKINGS[arm], seed=trial.seed)
        pool = {f"mixed-{number}": vector for number, vector in enumerate(mixed)}
        state = learn_addition(digits, compose(digits, pool), trial)
        values[f"{arm}, budget {budget}"] = digits.mean_accuracy(state)
    return values


def _mixed_is_no_worse(budget: int) -> Inequality:
    return Inequality(
        f"budget {budget}: mixed blocks >= whole vectors",
        lambda values: values[f"mixed blocks, budget {budget}"] >= values[f"whole vectors, budget {budget}"],
    )


MIXING = Claim(
    name="Memory mixing",
    statement="Under a budget, vectors mixed from the blocks with the largest gradients serve 8 tasks better than whole vectors",
    metric="test accuracy, 8 tasks, higher is better",
    measure=_measure,
    baselines=("base", *(f"{arm}, budget {budget}" for budget in (2, 4) for arm in ("random vectors", "whole vectors"))),
    inequalities=(_mixed_is_no_worse(2), _mixed_is_no_worse(4)),
    config={**ADDITION_CONFIG, "budgets": [2, 4]},
    quick={**ADDITION_QUICK, "budgets": [2, 4], "steps": 2},
    note="Without a budget there are 8 vectors: see Task addition. One gradient at C = 0 decides which blocks are taken.",
)

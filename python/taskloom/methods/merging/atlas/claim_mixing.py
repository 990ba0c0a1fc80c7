"""A budget of memory: task addition with fewer vectors than tasks, mixed from the blocks that matter most or chosen as they are."""

from __future__ import annotations

from torch import Tensor, nn

from taskloom.methods.claim import Claim, Inequality, Trial, Values
from taskloom.methods.merging.atlas.claim_addition import ADDITION_CONFIG, ADDITION_QUICK, addition_loss, learn_addition
from taskloom.methods.merging.atlas.claim_training import build_digits, compose, mean_accuracy, task_name, task_vectors
from taskloom.methods.merging.atlas.mixing import Ranking, block_gradients, mix_blocks
from taskloom.methods.merging.projected_digits import load_encoder
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
    values = {"base": mean_accuracy(digits, digits.base, range(len(digits.tasks)))}
    arms = [(budget, arm) for budget in trial.config["budgets"] for arm in _RANKINGS]
    for place, (budget, arm) in enumerate(arms):
        trial.progress((1 + place) / (1 + len(arms)))
        mixed = mix_blocks(vectors, grads, budget, by=_RANKINGS[arm], seed=trial.seed)
        pool = {f"mixed-{number}": vector for number, vector in enumerate(mixed)}
        state = learn_addition(digits, compose(digits, pool), trial)
        values[f"{arm}, budget {budget}"] = mean_accuracy(digits, state, range(len(digits.tasks)))
    return values


MIXING = Claim(
    name="Memory mixing",
    statement="Under a budget of vectors, vectors mixed from the blocks with the largest gradients serve eight tasks better than whole ones",
    metric="mean test accuracy of 8 tasks, higher is better",
    measure=_measure,
    baselines=("base", *(f"{arm}, budget {budget}" for budget in (2, 4) for arm in ("random vectors", "whole vectors"))),
    inequalities=tuple(
        Inequality(
            f"budget {budget}: mixed blocks >= whole vectors",
            lambda values, budget=budget: values[f"mixed blocks, budget {budget}"] >= values[f"whole vectors, budget {budget}"],  # type: ignore[misc]
            "the mean",
        )
        for budget in (2, 4)
    ),
    config={**ADDITION_CONFIG, "budgets": [2, 4]},
    quick={**ADDITION_QUICK, "budgets": [2, 4], "steps": 2},
    note="All vectors take as much memory as there are tasks (see Task addition). Which blocks are taken is decided by one gradient at C = 0.",
)

"""Projected digits fine-tuned twice, ordinarily and in the tangent space, and three ways to edit them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, reduce

import torch
from torch import Tensor, nn

from taskloom.merge import TaskVector
from taskloom.methods.merging import projected_digits
from taskloom.methods.merging.projected_digits import ProjectedDigits, SplitName
from taskloom.methods.merging.tangent_arithmetic.edited import EditedModel
from taskloom.methods.merging.tangent_arithmetic.linearized import LinearizedModel

ORDINARY, POST_HOC, LINEAR = "ordinary", "post-hoc", "linear"
ARMS = (ORDINARY, POST_HOC, LINEAR)

Accuracies = Callable[[float], list[float]]


@dataclass(frozen=True)
class Arm:
    """One way to edit: the encoder at p0 that vectors are added to, and each task's vector."""

    encoder: nn.Module
    vectors: dict[int, TaskVector]

    @property
    def total(self) -> TaskVector:
        """The sum of all vectors."""
        return reduce(operator.add, self.vectors.values())


@dataclass(frozen=True)
class Models:
    """The set-up with its arms."""

    digits: ProjectedDigits
    arms: dict[str, Arm]

    def edited(self, arm: str, tasks: Sequence[int]) -> EditedModel:
        """An arm's model with the heads of some tasks, which it then counts from 0."""
        return EditedModel(self.arms[arm].encoder, [self.digits.head(task) for task in tasks])

    def accuracies(self, arm: str, vector: TaskVector, tasks: Sequence[int], split: SplitName) -> Accuracies:
        """Accuracy on the tasks' splits at ``p0 + alpha * vector``, as a function of alpha that remembers what it was asked."""
        model, parts = self.edited(arm, tasks), [self.digits.tasks[task].splits[split] for task in tasks]
        if model.linear is None:

            def logits(alpha: float) -> list[Tensor]:
                scaled = alpha * vector
                return [model(scaled, part.inputs, place) for place, part in enumerate(parts)]
        else:
            expansions = [model.changes([vector], part.inputs, place) for place, part in enumerate(parts)]

            def logits(alpha: float) -> list[Tensor]:
                return [expansion([alpha]) for expansion in expansions]

        @cache
        def found(alpha: float) -> list[float]:
            return [float((own.argmax(1) == part.labels).double().mean()) for own, part in zip(logits(alpha), parts, strict=True)]

        return found

    def single_task(self, arm: str, split: SplitName) -> list[float]:
        """Accuracy of every task's own vector on its task."""
        return [self.accuracies(arm, vector, [task], split)(1.0)[0] for task, vector in self.arms[arm].vectors.items()]


# Several experiments share the models of a seed, which are small.
@lru_cache(maxsize=8)
def build_models(seed: int, tasks: int, pretrain_steps: int, finetune_steps: int) -> Models:
    """The models of a seed; the same batches train the ordinary and the linear ones."""
    digits = projected_digits.build(seed, tasks=tasks, pretrain_steps=pretrain_steps, finetune_steps=finetune_steps)
    base, ordinary, linear = projected_digits.load_encoder(digits.base), dict[int, TaskVector](), dict[int, TaskVector]()
    for task, (head, own) in enumerate(zip(digits.heads, digits.tasks, strict=True)):
        ordinary[task] = TaskVector(digits.base, digits.tuned[task])
        tangent = LinearizedModel(base)
        projected_digits.train_on_task(tangent, head, own, steps=finetune_steps, seed=seed + 1 + task)
        linear[task] = tangent.task_vector()
    expansion = LinearizedModel(base)
    post_hoc = {task: vector.as_regime("linear") for task, vector in ordinary.items()}
    return Models(digits, {ORDINARY: Arm(base, ordinary), POST_HOC: Arm(expansion, post_hoc), LINEAR: Arm(expansion, linear)})


def kernel_network(seed: int, tasks: int, width: int, pretrain_steps: int, projections: int) -> nn.Module:
    """An encoder, pre-trained for so many steps, and random projections of its features."""
    made = projected_digits.make_tasks(projected_digits.load_splits(seed), tasks, seed)
    encoder, heads = projected_digits.build_network(tasks, width, seed)
    projected_digits.pretrain(encoder, heads, made, steps=pretrain_steps, seed=seed)
    projection = nn.Linear(width, projections, bias=False)
    with torch.no_grad():
        projection.weight.copy_(torch.randn(projections, width, generator=torch.Generator().manual_seed(seed)) / width**0.5)
    return nn.Sequential(encoder, projection.requires_grad_(False))


def kernel_points(seed: int, tasks: int, points: int) -> Tensor:
    """So many test inputs of each task, one task after the other."""
    made = projected_digits.make_tasks(projected_digits.load_splits(seed), tasks, seed)
    return torch.cat([task.splits["test"].inputs[:points] for task in made])

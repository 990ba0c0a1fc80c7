"""What the experiments share: the digits of a seed, its task vectors, and coefficients trained by a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from taskloom.merge import TaskVector
from taskloom.methods.merging import projected_digits
from taskloom.methods.merging.atlas.coefficients import Coefficients, Granularity
from taskloom.methods.merging.atlas.losses import Batch
from taskloom.methods.merging.atlas.model import AtlasModel
from taskloom.methods.merging.projected_digits import ProjectedDigits, Split

WEIGHT_DECAY = 0.1
CLIP = 1.0

Pool = Mapping[str, Mapping[str, Tensor]]


@lru_cache(maxsize=2)
def build_digits(seed: int, finetune_steps: int, pretrain_steps: int = 4) -> ProjectedDigits:
    """The set-up of a seed, which several claims of a run share."""
    return projected_digits.build(seed, pretrain_steps=pretrain_steps, finetune_steps=finetune_steps)


def task_vectors(digits: ProjectedDigits) -> dict[str, TaskVector]:
    """Every task's vector."""
    return {name: TaskVector(digits.base, tuned) for name, tuned in digits.tuned_by_task.items()}


def compose(
    digits: ProjectedDigits, pool: Pool, *, granularity: Granularity = "block", partitions: int = 1, partition_seed: int = 0
) -> AtlasModel:
    """The base with a pool of task vectors."""
    base = projected_digits.load_encoder(digits.base)
    return AtlasModel(base, pool, granularity=granularity, partitions=partitions, partition_seed=partition_seed)


def train(
    atlas: Coefficients,
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    cosine: bool = False,
    every: int = 1,
    check: Callable[[], bool] = lambda: True,
) -> None:
    """AdamW on the coefficients with the paper's decay and clipping; ``check`` after every so many steps ends it by false."""
    optimizer = torch.optim.AdamW([atlas.coef], lr=lr, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if cosine else None
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(step).backward()
        torch.nn.utils.clip_grad_norm_([atlas.coef], CLIP)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        if step % every == 0 and not check():
            return


def draw(split: Split, size: int, generator: torch.Generator) -> Batch:
    """A random batch as the losses take it."""
    batch = projected_digits.draw_batch(split, size, generator)
    return batch.inputs, batch.labels

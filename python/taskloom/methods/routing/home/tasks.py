"""Tasks in categories, their towers and their loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taskloom.nn.multi_gate import check_sizes

Categories = Mapping[str, Sequence[str]]


def check_tasks(model: str, tasks: Categories) -> dict[str, str]:
    """The category of each task, in order.

    Raises
    ------
    ValueError
        If there is no category, a category has no task, or a task is in two of them.
    """
    if not tasks:
        raise ValueError(f"{model}: tasks: expected at least one category of tasks, got none")
    category_of: dict[str, str] = {}
    for category, names in tasks.items():
        if isinstance(names, str) or not names:
            raise ValueError(f"{model}: tasks: expected a list of at least one task for category {category!r}, got {names!r}")
        for name in names:
            if name in category_of:
                where = f"in {category_of[name]!r} and {category!r}" if category_of[name] != category else f"twice in {category!r}"
                raise ValueError(f"{model}: tasks: expected each task in one category, got {name!r} {where}")
            category_of[name] = category
    return category_of


class Towers(nn.Module):
    """A small network for each task, from its features to a logit.

    Parameters
    ----------
    tasks
        Their names.
    in_dim, hidden
        Features of the input and of the layers between (the models' ``tower_dims``), with ReLU behind each.

    Raises
    ------
    TypeError
        If a size is no integer.
    ValueError
        If a size is below 1.
    """

    def __init__(self, tasks: Sequence[str], in_dim: int, hidden: Sequence[int]) -> None:
        super().__init__()
        check_sizes("Towers", in_dim=in_dim, **{f"tower_dims[{place}]": size for place, size in enumerate(hidden)})
        self.tasks = tuple(tasks)
        self.layers = nn.ModuleList(_tower((in_dim, *hidden)) for _ in tasks)

    def forward(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        """A logit ``[B]`` for each task, from its features ``[B, in_dim]``."""
        rows = zip(self.tasks, self.layers, features, strict=True)
        return {task: tower(x)[:, 0] for task, tower, x in rows}


def _tower(sizes: Sequence[int]) -> nn.Sequential:
    hidden = [layer for inner, outer in pairwise(sizes) for layer in (nn.Linear(inner, outer), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], 1))


def multi_task_loss(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
    """The sum over tasks of the mean binary cross-entropy.

    Parameters
    ----------
    logits
        ``[B]`` for each task, as the models return them.
    labels
        ``[B]`` for each task: 0 or 1, or NaN where a row has no label of the task. A task without any label adds 0.

    Raises
    ------
    ValueError
        If there is no task, the tasks differ or shapes do; for labels on the CPU, outside compiled code, if one is neither 0, 1 nor NaN.

    Notes
    -----
    Source: HoME, arXiv 2408.05430: equal weights. That rows may lack labels is this library's.
    """
    if not logits:
        raise ValueError("multi_task_loss: logits: expected at least one task, got none")
    if logits.keys() != labels.keys():
        raise ValueError(f"multi_task_loss: labels: expected tasks {sorted(logits)}, got {sorted(labels)}")
    losses = []
    for task, said in logits.items():
        label = labels[task]
        if label.shape != said.shape:
            raise ValueError(f"multi_task_loss: labels[{task!r}]: expected shape {tuple(said.shape)}, got {tuple(label.shape)}")
        known = ~label.isnan()
        if label.is_cpu and not torch.compiler.is_compiling() and bool((known & (label != 0) & (label != 1)).any()):
            raise ValueError(f"multi_task_loss: labels[{task!r}]: expected 0, 1 or NaN, got another value")
        # Of both sides, since a logit of a row without a label may be infinite.
        kept, wanted = torch.where(known, said, 0), torch.where(known, label, 0).to(said.dtype)
        each = F.binary_cross_entropy_with_logits(kept, wanted, reduction="none")
        losses.append((each * known).sum() / known.sum().clamp(min=1))
    return torch.stack(losses).sum()

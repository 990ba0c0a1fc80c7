"""Few-shot adaptation: k examples a class, repeated to full epochs, and a pool that leaves the target's own vector out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

Vector = TypeVar("Vector")


def choose_shots(labels: Tensor, k: int, *, seed: int = 0) -> Tensor:
    """Indices of k random examples of every class.

    Parameters
    ----------
    labels
        Integers [N].
    k
        Examples of each class that occurs, 1 or more.
    seed
        The same indices for the same labels, k and seed; those of a smaller k are among them.

    Returns
    -------
    Tensor
        int64 [classes * k], class by class, on the CPU.

    Raises
    ------
    TypeError
        If the labels are no integers.
    ValueError
        If ``k`` is below 1, there are no labels, or a class has fewer than k examples.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"choose_shots: labels: expected integers, got {labels.dtype}")
    if labels.dim() != 1 or len(labels) == 0:
        raise ValueError(f"choose_shots: labels: expected shape [N] with N >= 1, got {list(labels.shape)}")
    if k < 1:
        raise ValueError(f"choose_shots: k: expected 1 or more, got {k}")
    labels = labels.cpu()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shots = []
    for label in labels.unique().tolist():
        own = order[labels[order] == label]
        if len(own) < k:
            raise ValueError(f"choose_shots: k: expected at most {len(own)}, the examples of class {label}, got {k}")
        shots.append(own[:k])
    return torch.cat(shots)


def repeat_shots(indices: Tensor, batch_size: int, *, batches: int = 10) -> Tensor:
    """Repeat the shots as a whole until an epoch of them has at least so many full batches; shuffle it for every epoch.

    Parameters
    ----------
    indices
        From :func:`choose_shots`.
    batch_size
        1 or more.
    batches
        Default 10.

    Raises
    ------
    ValueError
        If there is no index, or a number is below 1.
    """
    if indices.dim() != 1 or len(indices) == 0:
        raise ValueError(f"repeat_shots: indices: expected shape [N] with N >= 1, got {list(indices.shape)}")
    for name, value in {"batch_size": batch_size, "batches": batches}.items():
        if value < 1:
            raise ValueError(f"repeat_shots: {name}: expected 1 or more, got {value}")
    return indices.repeat(-(-batch_size * batches // len(indices)))


def pool_without(task_vectors: Mapping[str, Vector], target: str) -> dict[str, Vector]:
    """The task vectors of all tasks but the target, which must not help itself.

    Raises
    ------
    KeyError
        If the target has no vector there, so that a misspelt name leaves none in.
    ValueError
        If no other task remains.
    """
    if target not in task_vectors:
        raise KeyError(f"pool_without: target: expected one of {', '.join(task_vectors)}, got {target!r}")
    if len(task_vectors) == 1:
        raise ValueError(f"pool_without: task_vectors: expected a task besides {target!r}, got none")
    return {task: vector for task, vector in task_vectors.items() if task != target}

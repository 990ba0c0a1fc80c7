"""How far task vectors are from acting on their own tasks only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from taskloom.merge import TaskVector
from taskloom.methods.merging.tangent_arithmetic.edited import EditedModel

Predict = Callable[[TaskVector, Any, int], Tensor]
Distance = Callable[[Tensor, Tensor], Tensor]
Alphas = tuple[float, ...]


def _argmax_differs(reference: Tensor, edited: Tensor) -> Tensor:
    if reference.ndim < 2:
        raise ValueError(f"disentanglement_error: predict: expected outputs [N, classes, ...], got shape {tuple(reference.shape)}")
    differs = reference.argmax(1) != edited.argmax(1)
    return differs.double().reshape(len(differs), -1).mean(1)


def _distances(distance: Distance, reference: Tensor, edited: Tensor) -> Tensor:
    """The distances [N] of a batch, in float64."""
    for outputs in (reference, edited):
        if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
            got = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
            raise TypeError(f"disentanglement_error: predict: expected a floating-point tensor, got {got}")
        # The largest of NaNs is the same class for both.
        if bool(outputs.isnan().any()):
            raise ValueError("disentanglement_error: predict: expected outputs that are numbers, got NaN")
    if reference.shape != edited.shape:
        shapes = f"{tuple(reference.shape)} and {tuple(edited.shape)}"
        raise ValueError(f"disentanglement_error: predict: expected outputs of one shape for a batch, got {shapes}")
    found = distance(reference, edited)
    if tuple(found.shape) != (len(reference),):
        raise ValueError(f"disentanglement_error: dist: expected shape {(len(reference),)}, got {tuple(found.shape)}")
    return found.detach().double()


def _inputs(loader: Iterable[Any], task: int) -> Iterator[Any]:
    """The inputs of a task's batches, without the labels where there are some."""
    empty = True
    for batch in loader:
        empty = False
        yield batch[0] if isinstance(batch, (tuple, list)) else batch
    if empty:
        raise ValueError(f"disentanglement_error: loaders: expected at least one batch of task {task}, got none")


def _mean(parts: Iterable[Tensor]) -> Tensor:
    total, count = torch.zeros((), dtype=torch.float64), 0
    for part in parts:
        total, count = total + part.sum().cpu(), count + len(part)
    return total / count


def _single(alphas: Alphas, task: int) -> Alphas:
    return tuple(alpha if place == task else 0.0 for place, alpha in enumerate(alphas))


def _task_errors(
    predict: Predict, vectors: Sequence[TaskVector], loaders: Sequence[Iterable[Any]], points: Sequence[Alphas], distance: Distance
) -> Iterator[Tensor]:
    """The error at every point, by adding vectors."""
    for alphas in points:
        scaled = [alpha * vector for alpha, vector in zip(alphas, vectors, strict=True)]
        together: TaskVector = sum(scaled[1:], start=scaled[0])
        error = torch.zeros((), dtype=torch.float64)
        for task, alone in enumerate(scaled):

            def parts(task: int = task, alone: TaskVector = alone, together: TaskVector = together) -> Iterator[Tensor]:
                for inputs in _inputs(loaders[task], task):
                    yield _distances(distance, predict(alone, inputs, task), predict(together, inputs, task))

            error = error + _mean(parts())
        yield error


def _linear_errors(
    predict: EditedModel, vectors: Sequence[TaskVector], loaders: Sequence[Iterable[Any]], points: Sequence[Alphas], distance: Distance
) -> Tensor:
    """The same for a linearised model: its outputs add up, so that a batch takes one pass per vector, whatever the number of points."""
    errors = torch.zeros(len(points), dtype=torch.float64)
    for task, loader in enumerate(loaders):
        sums, count = torch.zeros(len(points), dtype=torch.float64), 0
        for inputs in _inputs(loader, task):
            outputs = predict.changes(vectors, inputs, task)
            parts = [_distances(distance, outputs(_single(alphas, task)), outputs(alphas)) for alphas in points]
            sums, count = sums + torch.stack([part.sum().cpu() for part in parts]), count + len(parts[0])
        errors += sums / count
    return errors


def _points(alphas: float | Sequence[float], tasks: int) -> tuple[list[Alphas], tuple[int, ...]]:
    """The coefficients to look at, and the shape of the result."""
    numbers = [float(alphas)] if isinstance(alphas, (int, float)) else [float(alpha) for alpha in alphas]
    for alpha in numbers:
        if not math.isfinite(alpha):
            raise ValueError(f"disentanglement_error: alphas: expected finite numbers, got {alpha}")
    if isinstance(alphas, (int, float)):
        return [(numbers[0],) * tasks], ()
    if tasks == 2:
        if not numbers:
            raise ValueError("disentanglement_error: alphas: expected at least one alpha, got none")
        return list(product(numbers, numbers)), (len(numbers), len(numbers))
    if len(numbers) != tasks:
        raise ValueError(f"disentanglement_error: alphas: expected one alpha or one per task ({tasks}), got {len(numbers)}")
    return [tuple(numbers)], ()


def disentanglement_error(
    predict: Predict | EditedModel,
    task_vectors: Sequence[TaskVector],
    loaders: Sequence[Iterable[Any]],
    alphas: float | Sequence[float],
    dist: Literal["argmax"] | Distance = "argmax",
) -> Tensor:
    """``xi(a) = sum_t E_{x of task t} dist(f(x; p0 + a_t tau_t), f(x; p0 + sum_s a_s tau_s))``.

    Parameters
    ----------
    predict
        ``predict(vector, inputs, task)``: outputs [N, classes] at ``p0 + vector`` by the task's own head. :class:`EditedModel` is one; of a
        linearised model it takes one pass per vector and batch, whatever the number of alphas.
    task_vectors
        One per task, of one regime.
    loaders
        Each task's batches: inputs, or tuples whose first entry they are. They are gone through more than once.
    alphas
        For two tasks, a grid that both coefficients run through. For any number of tasks a number, the coefficient of all; for other
        numbers of tasks than two also one coefficient per task.
    dist
        ``"argmax"`` (default): 1 where the predicted classes differ. Or a function of outputs on their own and outputs together that
        returns a distance for each of N examples.

    Returns
    -------
    Tensor
        float64. ``[i, j]`` is xi(alphas[i], alphas[j]) for two tasks' grid; 0-d otherwise. The sum over tasks is not divided by their
        number.

    Raises
    ------
    TypeError
        If outputs are no floating-point tensors, or a loader can be gone through only once.
    ValueError
        If there is no task vector, regimes are mixed, a loader is empty, outputs are NaN, an alpha is not finite, or lengths or
        shapes do not fit.

    Notes
    -----
    Source: Ortiz-Jimenez et al., NeurIPS 2023, arXiv 2305.12827, section 4, equation 4.
    """
    if not task_vectors:
        raise ValueError("disentanglement_error: task_vectors: expected at least one, got none")
    if len(loaders) != len(task_vectors):
        raise ValueError(f"disentanglement_error: loaders: expected one per task vector ({len(task_vectors)}), got {len(loaders)}")
    regimes = {vector.regime for vector in task_vectors}
    if len(regimes) > 1:
        raise ValueError("disentanglement_error: task_vectors: expected one regime, got linear and nonlinear ones; see as_regime()")
    for loader in loaders:
        if isinstance(loader, Iterator):
            raise TypeError(f"disentanglement_error: loaders: expected what can be gone through again, got {type(loader).__name__}")
    distance: Distance = _argmax_differs if dist == "argmax" else _callable(dist)
    points, shape = _points(alphas, len(task_vectors))
    if isinstance(predict, EditedModel) and predict.linear is not None:
        return _linear_errors(predict, task_vectors, loaders, points, distance).reshape(shape)
    return torch.stack(list(_task_errors(predict, task_vectors, loaders, points, distance))).reshape(shape)


def _callable(dist: object) -> Distance:
    if not callable(dist):
        raise ValueError(f"disentanglement_error: dist: expected 'argmax' or a function, got {dist!r}")
    return dist


def nonlinear_advantage(accuracy_nonlinear: float, accuracy_linear: float, classes: int) -> float:
    """``(accuracy_nonlinear - accuracy_linear) * C / (C - 1)``: what fine-tuning outside the tangent space gains, 1 at most.

    Raises
    ------
    ValueError
        If an accuracy is not from 0 to 1, or there are less than 2 classes.

    Notes
    -----
    Source: Ortiz-Jimenez et al., NeurIPS 2023, arXiv 2305.12827, and its code.
    """
    for name, accuracy in (("accuracy_nonlinear", accuracy_nonlinear), ("accuracy_linear", accuracy_linear)):
        if not 0 <= accuracy <= 1:
            raise ValueError(f"nonlinear_advantage: {name}: expected 0 to 1, got {accuracy}")
    if classes < 2:
        raise ValueError(f"nonlinear_advantage: classes: expected 2 or more, got {classes}")
    return (accuracy_nonlinear - accuracy_linear) * classes / (classes - 1)

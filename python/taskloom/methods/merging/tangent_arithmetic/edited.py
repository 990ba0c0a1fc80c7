"""What a model says after a task vector has been added to its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taskloom.merge import TaskVector
from taskloom.methods.merging.tangent_arithmetic.linearized import LinearizedModel

Head = Callable[[Any], Tensor]

_KEPT = 2


class EditedModel:
    """The outputs of a model at ``p0 + vector``: the ``predict`` of :func:`disentanglement_error`.

    Parameters
    ----------
    model
        The model at p0, copied; or a :class:`LinearizedModel`, which is used as it is, around its p0 whatever its tau.
    heads
        Each task's head, applied to the model's outputs. Default None: the outputs themselves.

    Notes
    -----
    Outputs are computed without a gradient and in eval mode. Of an ordinary model, copies with the last two vectors it was asked for
    are kept, of a linearised one nothing.
    """

    def __init__(self, model: nn.Module, heads: Sequence[Head] | None = None) -> None:
        self.linear = model if isinstance(model, LinearizedModel) else None
        self._model = copy.deepcopy(model).eval() if self.linear is None else model
        self._heads = heads
        self._kept: list[tuple[TaskVector, nn.Module]] = []

    def _head(self, outputs: Any, task: int) -> Tensor:
        found: Tensor = outputs if self._heads is None else self._heads[task](outputs)
        return found

    def _at(self, vector: TaskVector) -> nn.Module:
        """A copy of the ordinary model with the vector added, changed in place so that weights held in other ways are changed too."""
        for known, edited in self._kept:
            if known is vector:
                return edited
        edited = vector.apply_to(self._model)
        self._kept = [*self._kept[1 - _KEPT :], (vector, edited)]
        return edited

    @torch.no_grad()
    def __call__(self, vector: TaskVector, inputs: Any, task: int) -> Tensor:
        """Outputs of a batch of a task's inputs at ``p0 + vector``.

        Raises
        ------
        ValueError
            If the vector's regime is not the model's.
        """
        if self.linear is not None:
            at_p0, change = self.linear.expand_along(vector, inputs)
            return self._head(at_p0 + change, task)
        return self._head(self._at(vector)(inputs), task)

    @torch.no_grad()
    def changes(self, vectors: Sequence[TaskVector], inputs: Any, task: int) -> Callable[[Sequence[float]], Tensor]:
        """For a linearised model: outputs of a batch at ``p0 + sum_t a_t vectors[t]`` for any a, by one pass per vector."""
        if self.linear is None:
            raise TypeError("EditedModel: changes: only a LinearizedModel's outputs add up, got an ordinary model")
        expansions = [self.linear.expand_along(vector, inputs) for vector in vectors]

        def outputs(alphas: Sequence[float]) -> Tensor:
            total = expansions[0][0]
            for alpha, (_, change) in zip(alphas, expansions, strict=True):
                total = total + alpha * change
            return self._head(total, task)

        return outputs

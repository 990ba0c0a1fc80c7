"""What a model says after a task vector has been added to its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

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
    Outputs are computed without a gradient and in eval mode. An ordinary model keeps the weights of the last two vectors it was asked
    for, a linearised one nothing.
    """

    def __init__(self, model: nn.Module, heads: Sequence[Head] | None = None) -> None:
        self.linear = model if isinstance(model, LinearizedModel) else None
        self._model = copy.deepcopy(model).eval() if self.linear is None else model
        self._heads = heads
        self._edited: list[tuple[TaskVector, dict[str, Tensor]]] = []

    def _head(self, outputs: Any, task: int) -> Tensor:
        found: Tensor = outputs if self._heads is None else self._heads[task](outputs)
        return found

    def _weights(self, vector: TaskVector) -> dict[str, Tensor]:
        for known, weights in self._edited:
            if known is vector:
                return weights
        if vector.regime != "nonlinear":
            raise ValueError(
                f"EditedModel: expected a nonlinear task vector for an ordinary model, got a {vector.regime} one; "
                "convert it with vector.as_regime('nonlinear') if that is meant"
            )
        weights = vector.apply_to(self._model.state_dict())
        self._edited = [*self._edited[1 - _KEPT :], (vector, weights)]
        return weights

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
        return self._head(functional_call(self._model, self._weights(vector), (inputs,)), task)

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

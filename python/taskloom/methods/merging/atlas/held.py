"""Composed weights that serve several forward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class HeldWeights:
    """The weights of one composition, for as long as coefficients and what autograd needs are the same.

    With ``accumulate`` forward passes see leaves with the weights' values, whose gradients add up over any number of backward passes;
    :meth:`flush` carries them on to the coefficients.
    """

    def __init__(self, compose: Callable[[], list[Tensor]], accumulate: bool) -> None:
        self._compose, self._accumulate = compose, accumulate
        self._composed: list[Tensor] | None = None
        self._leaves: list[Tensor] = []
        self._coef: Tensor | None = None
        self._version = 0
        self._with_grad = False

    def weights(self, coef: Tensor) -> Sequence[Tensor]:
        """Those of the present coefficients."""
        grad = torch.is_grad_enabled()
        changed = coef is not self._coef or coef._version != self._version
        if self._composed is None or changed or (grad and not self._with_grad):
            self.flush()
            self._composed = self._compose()
            self._coef, self._version, self._with_grad = coef, coef._version, grad
            if self._accumulate and self._composed[0].requires_grad:
                self._leaves = [one.detach().requires_grad_() for one in self._composed]
        return self._leaves or self._composed

    def flush(self) -> None:
        """Carry the gradients that came together on to the coefficients, and forget the weights."""
        if self._leaves and self._composed is not None:
            found = [(one, leaf.grad) for one, leaf in zip(self._composed, self._leaves, strict=True) if leaf.grad is not None]
            for leaf in self._leaves:
                leaf.grad = None
            if found:
                torch.autograd.backward([one for one, _ in found], [gradient for _, gradient in found])
        self._composed, self._leaves = None, []

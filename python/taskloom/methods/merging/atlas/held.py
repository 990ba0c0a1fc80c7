"""Composed weights that serve several forward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class HeldWeights:
    """The weights of one composition, for as long as coefficients, base and what autograd needs are the same.

    With ``accumulate`` forward passes see leaves with the weights' values, whose gradients add up over any number of backward passes;
    :meth:`flush` carries them on to the coefficients.
    """

    def __init__(self, compose: Callable[[], list[Tensor]], base: Callable[[], list[Tensor]], accumulate: bool) -> None:
        self._compose, self._base, self._accumulate = compose, base, accumulate
        self._composed: list[Tensor] | None = None
        self._leaves: list[Tensor] = []
        self._versions: list[tuple[int, int, int]] = []
        self._with_grad = False

    def weights(self, coef: Tensor) -> Sequence[Tensor]:
        """Those of the present coefficients."""
        grad = torch.is_grad_enabled()
        versions = [_version(one) for one in (coef, *self._base())]
        if self._composed is None or versions != self._versions or (grad and not self._with_grad):
            self.flush()
            self._composed = self._compose()
            self._versions, self._with_grad = versions, grad
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


def _version(tensor: Tensor) -> tuple[int, int, int]:
    # What was made in inference mode does not count its changes.
    return id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version

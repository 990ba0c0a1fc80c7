"""Which coefficients to keep of those that training passes through; none that do harm: C = 0, the base, is always a choice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor


def _check_number(function: str, name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{function}: {name}: expected a finite number, got {value}")


def normalised_accuracy(accuracies: Sequence[float] | Mapping[str, float], finetuned: Sequence[float] | Mapping[str, float]) -> float:
    """Mean over the tasks of an accuracy divided by that of the task's own fine-tuned model.

    Parameters
    ----------
    accuracies, finetuned
        By task, or in one order of the tasks; one or more.

    Raises
    ------
    TypeError
        If one is a mapping and the other is not.
    ValueError
        If the tasks are not the same, there is none, an accuracy is not finite, or a fine-tuned one is not above 0.
    """
    if isinstance(accuracies, Mapping) and isinstance(finetuned, Mapping):
        if set(accuracies) != set(finetuned):
            raise ValueError(f"normalised_accuracy: finetuned: expected the tasks {', '.join(accuracies)}, got {', '.join(finetuned)}")
        pairs = [(accuracies[task], finetuned[task]) for task in accuracies]
    elif isinstance(accuracies, Mapping) or isinstance(finetuned, Mapping):
        raise TypeError("normalised_accuracy: finetuned: expected a mapping or a sequence as accuracies is")
    else:
        if len(accuracies) != len(finetuned):
            raise ValueError(f"normalised_accuracy: finetuned: expected {len(accuracies)} accuracies, got {len(finetuned)}")
        pairs = list(zip(accuracies, finetuned, strict=True))
    if not pairs:
        raise ValueError("normalised_accuracy: accuracies: expected one or more tasks, got none")
    for _, own in pairs:
        if not (own > 0 and math.isfinite(own)):
            raise ValueError(f"normalised_accuracy: finetuned: expected finite accuracies above 0, got {own}")
    for accuracy, _ in pairs:
        _check_number("normalised_accuracy", "accuracies", accuracy)
    return fmean(accuracy / own for accuracy, own in pairs)


class BestCoefficients:
    """Keeps a copy of the coefficients with the highest score; zeros, the base model, while nothing has scored higher than it.

    Parameters
    ----------
    coef
        The trained coefficients, such as ``AtlasModel.coef``; read by :meth:`update` and written by :meth:`restore`.
    base_score
        Score of the base model on the same data, such as its normalised accuracy on the validation split.

    Attributes
    ----------
    score
        The highest so far, ``base_score`` at first.
    improved
        Whether any coefficients have scored higher than the base.

    Raises
    ------
    ValueError
        If a score is not finite.
    """

    def __init__(self, coef: Tensor, base_score: float) -> None:
        _check_number("BestCoefficients", "base_score", base_score)
        self._coef = coef
        self._best = torch.zeros_like(coef, requires_grad=False)
        # A copy: a running score may be a tensor that is written to.
        self.score = float(base_score)
        self.improved = False

    def update(self, score: float) -> bool:
        """Keep the current coefficients if their score is higher than any before; says whether it is."""
        _check_number("BestCoefficients", "score", score)
        if score <= self.score:
            return False
        self.score, self.improved = float(score), True
        self._best.copy_(self._coef.detach())
        return True

    @torch.no_grad()
    def restore(self) -> None:
        """Write what was kept into the coefficients."""
        self._coef.copy_(self._best)


class Negation:
    """Keeps the coefficients with the lowest target accuracy that leave the control at a share of the base's, and says when to stop.

    Parameters
    ----------
    coef
        The trained coefficients; read by :meth:`update` and written by :meth:`restore`.
    base_target, base_control
        The base model's accuracies on validation data of the two.
    threshold
        The share of the base's control accuracy that has to remain, in (0, 1]. Default 0.95.

    Attributes
    ----------
    target
        The lowest target accuracy so far within the bound, the base's at first.
    control_bound
        ``threshold * base_control``.

    Raises
    ------
    ValueError
        If the control's accuracy is missing, an accuracy is not in [0, 1], or the threshold is out of range.

    Notes
    -----
    Source: Zhang et al. 2024, arXiv 2407.02880, task negation.
    """

    def __init__(self, coef: Tensor, base_target: float, base_control: float | None, *, threshold: float = 0.95) -> None:
        if base_control is None:
            raise ValueError("Negation: base_control: expected the base's accuracy on a control task, got None")
        if not 0 < threshold <= 1:
            raise ValueError(f"Negation: threshold: expected a number in (0, 1], got {threshold}")
        _check_accuracy("base_target", base_target)
        _check_accuracy("base_control", base_control)
        self.control_bound = threshold * base_control
        self._lowest = BestCoefficients(coef, -base_target)

    @property
    def target(self) -> float:
        """The lowest target accuracy so far within the bound."""
        return -self._lowest.score

    def update(self, target: float, control: float) -> bool:
        """Take note of the current coefficients' validation accuracies; false once the control is below its bound: stop then."""
        _check_accuracy("target", target)
        _check_accuracy("control", control)
        if control < self.control_bound:
            return False
        self._lowest.update(-target)
        return True

    def restore(self) -> None:
        """Write what was kept into the coefficients: zeros, if nothing lowered the target within the bound."""
        self._lowest.restore()


def _check_accuracy(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"Negation: {name}: expected an accuracy in [0, 1], got {value}")

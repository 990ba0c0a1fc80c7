"""Weighted cross-entropy of a language-model head, in plain torch: full logits."""

from __future__ import annotations

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype


def _logits(hidden: Tensor, weight: Tensor | None, picked: Tensor) -> Tensor:
    """The logits of picked rows; a row of hidden that is not picked counts as zeros."""
    dtype = accumulation_dtype(hidden, weight)
    rows = torch.where(picked[:, None], hidden.to(dtype), 0)
    return rows if weight is None else rows @ weight.to(dtype).t()


def weighted_ce(hidden: Tensor, weight: Tensor | None, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Give sum(weights * ce) / sum(weights), and each supervised row's log-probability of its target, 0 elsewhere."""
    supervised = weights > 0
    log_softmax = _logits(hidden, weight, supervised).log_softmax(1)
    chosen = log_softmax.gather(1, torch.where(supervised, targets, 0)[:, None])[:, 0]
    log_probs = torch.where(supervised, chosen, 0)
    factors = weights.to(log_probs.dtype)
    return -(factors * log_probs).sum() / factors.sum(), log_probs


def weighted_ce_backward(
    hidden: Tensor, weight: Tensor | None, targets: Tensor, coefficient: Tensor, log_sum_exp: Tensor, for_hidden: bool, for_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Push coefficient * (softmax - onehot) through the head; a row of coefficient 0 counts nothing."""
    picked = coefficient != 0
    slopes = (_logits(hidden, weight, picked) - log_sum_exp[:, None]).exp()
    slopes = slopes.scatter_add(1, torch.where(picked, targets, 0)[:, None], slopes.new_full((len(slopes), 1), -1))
    slopes = torch.where(picked[:, None], coefficient[:, None] * slopes, 0)
    rows = torch.where(picked[:, None], hidden.to(slopes.dtype), 0)
    if weight is None:
        return slopes.to(hidden.dtype) if for_hidden else None, None
    hidden_gradient = (slopes @ weight.to(slopes.dtype)).to(hidden.dtype) if for_hidden else None
    return hidden_gradient, (slopes.t() @ rows).to(weight.dtype) if for_weight else None

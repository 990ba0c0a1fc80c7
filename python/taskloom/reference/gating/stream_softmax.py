"""The Bayes estimator over a pool of linear experts, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype


def _evidence(x: Tensor, y: Tensor, experts: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions and residuals of all experts [B, K, M], and their log-likelihoods of the pairs before each."""
    predictions = x @ experts.T
    residuals = y[..., None] - predictions
    squares = torch.cumsum(residuals.square(), 1)
    before = torch.cat([torch.zeros_like(squares[:, :1]), squares[:, :-1]], 1)
    return predictions, residuals, before * (-0.5 / sigma**2)


def stream_softmax_mix(x: Tensor, y: Tensor, experts: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """The posterior mean of x's targets, and the log of the summed likelihoods, [B, K] each."""
    dtype = accumulation_dtype(x, y, experts)
    predictions, _, scores = _evidence(x.to(dtype), y.to(dtype), experts.to(dtype), sigma)
    return (torch.softmax(scores, -1) * predictions).sum(-1), torch.logsumexp(scores, -1)


def stream_softmax_mix_backward(
    for_pred: Tensor | None,
    for_lse: Tensor | None,
    x: Tensor,
    y: Tensor,
    experts: Tensor,
    pred: Tensor,
    lse: Tensor,
    sigma: float,
    for_x: bool,
    for_y: bool,
    for_experts: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, y and experts; empty where not wanted."""
    dtype = accumulation_dtype(x, y, experts)
    wide, pool = x.to(dtype), experts.to(dtype)
    predictions, residuals, scores = _evidence(wide, y.to(dtype), pool, sigma)
    posterior = torch.exp(scores - lse[..., None])
    zero = torch.zeros_like(pred)
    by_pred = (zero if for_pred is None else for_pred.to(dtype))[..., None]
    by_lse = (zero if for_lse is None else for_lse.to(dtype))[..., None]
    for_scores = posterior * (by_pred * (predictions - pred[..., None]) + by_lse)
    # A residual counts in the scores of all later pairs.
    following = for_scores.flip(1).cumsum(1).flip(1)[:, 1:]
    later = torch.cat([following, torch.zeros_like(for_scores[:, :1])], 1)
    slopes = residuals * later * (-1 / sigma**2)
    for_predictions = by_pred * posterior - slopes
    none = x.new_empty(0)
    return (
        (for_predictions @ pool).to(x.dtype) if for_x else none,
        slopes.sum(-1).to(y.dtype) if for_y else y.new_empty(0),
        torch.einsum("bkm,bkd->md", for_predictions, wide).to(experts.dtype) if for_experts else experts.new_empty(0),
    )

"""The gradients of the softmax gate over very many linear experts, composed of torch's products in chunks of experts: what GPUs run."""

from __future__ import annotations

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype, without_autocast

# Entries of a chunk's [B, K, M] tensors, of which there are a few at a time.
CHUNK_ENTRIES = 1 << 21


@without_autocast
def stream_softmax_mix_backward(
    x: Tensor,
    y: Tensor,
    experts: Tensor,
    for_pred: Tensor | None,
    for_lse: Tensor | None,
    pred: Tensor,
    lse: Tensor,
    sigma: float,
    for_x: bool,
    for_y: bool,
    for_experts: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, y and experts; empty where not wanted. No tensor of all experts and pairs is made."""
    dtype = accumulation_dtype(x, y, experts)
    inputs, targets = x.to(dtype), y.to(dtype)
    zero = torch.zeros_like(pred)
    by_pred, by_lse = (zero if one is None else one for one in (for_pred, for_lse))
    dx, dy = (torch.zeros_like(one, memory_format=torch.contiguous_format) for one in (inputs, targets))
    dexperts = torch.empty(experts.shape if for_experts else (0,), dtype=experts.dtype, device=experts.device)
    step = max(1, CHUNK_ENTRIES // max(1, y.numel()))
    for first in range(0, len(experts), step):
        pool = experts[first : first + step].to(dtype)
        predictions = torch.matmul(inputs, pool.T)
        errors = targets[..., None] - predictions
        scores = errors.square().cumsum_(1)
        posterior = torch.cat([torch.zeros_like(scores[:, :1]), scores[:, :-1]], 1).mul_(-0.5 / sigma**2).sub_(lse[..., None]).exp_()
        for_scores = predictions.sub_(pred[..., None]).mul_(by_pred[..., None]).add_(by_lse[..., None]).mul_(posterior)
        # A squared error counts in the scores of all later pairs.
        later = for_scores.flip(1).cumsum_(1).flip(1)
        slopes = errors.mul_(torch.cat([later[:, 1:], torch.zeros_like(later[:, :1])], 1)).mul_(-1 / sigma**2)
        for_predictions = posterior.mul_(by_pred[..., None]).sub_(slopes)
        if for_x:
            dx += torch.matmul(for_predictions, pool)
        if for_y:
            dy += slopes.sum(-1)
        if for_experts:
            dexperts[first : first + step] = torch.matmul(for_predictions.flatten(0, 1).T, inputs.flatten(0, 1))
    return (
        dx.to(x.dtype) if for_x else x.new_empty(0),
        dy.to(y.dtype) if for_y else y.new_empty(0),
        dexperts,
    )

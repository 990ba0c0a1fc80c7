"""The router of a sparse mixture of experts, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.reference.gating.exact import exact_sigmoid, exact_softmax

Gated = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _by_rank(values: Tensor, kept: Tensor | None = None) -> Tensor:
    """Each row's places by falling value, ties by place; those that are not kept come last, whatever their value."""
    places = values.sort(dim=1, descending=True, stable=True).indices
    if kept is None:
        return places
    first = kept.gather(1, places).to(torch.int8).sort(dim=1, descending=True, stable=True).indices
    return places.gather(1, first)


def choice_values(
    logits: Tensor, bias: Tensor | None, score: str, *, groups: bool, group_score: str, group_mask: float, temperature: float
) -> Tensor:
    """What experts are chosen by: the scores and their bias, or the logits where these have the same order."""
    dtype = accumulation_dtype(logits, bias)
    values = logits.to(dtype)
    if bias is None and not (groups and (group_score == "top2" or group_mask != -math.inf)):
        return values
    z = values * (1 / temperature)
    scores = exact_softmax(z) if score == "softmax" else exact_sigmoid(z)
    return scores if bias is None else scores + bias.to(dtype)


@torch.no_grad()
def choose_experts(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    score: str,
    n_group: int,
    topk_group: int,
    group_score: str,
    group_mask: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The experts ``[T, k]`` of each row, best first, and which rows ``[T]`` have a NaN; those get experts 0 to k - 1."""
    groups = topk_group < n_group
    values = choice_values(logits, bias, score, groups=groups, group_score=group_score, group_mask=group_mask, temperature=temperature)
    bad = values.isnan().any(1)
    kept = None
    if groups:
        by_group = values.reshape(len(values), n_group, values.shape[1] // n_group)
        best = by_group.amax(2) if group_score == "max" else by_group.topk(2, dim=2).values.sum(2)
        bad = bad | best.isnan().any(1)
        chosen = torch.zeros_like(best, dtype=torch.bool).scatter(1, _by_rank(best)[:, :topk_group], True)
        kept = chosen.repeat_interleave(values.shape[1] // n_group, dim=1)
        if group_mask != -math.inf:
            values, kept = torch.where(kept, values, group_mask), None
    first = torch.arange(k, device=logits.device)
    return torch.where(bad[:, None], first, _by_rank(values, kept)[:, :k]), bad


def _shares(z: Tensor, score: str) -> Tensor:
    """Each expert's probability."""
    if score == "softmax":
        return z.softmax(1)
    scores = z.sigmoid()
    total = scores.sum(1, keepdim=True)
    # Some of these rows' sigmoids are too small to be told from 0: their shares are the softmax of the row, but for rounding.
    low = total < (2.0**-100 if z.dtype == torch.float32 else 2.0**-960)
    # The softmax of another row, which may not be finite, would make NaN of its gradient.
    return torch.where(low, torch.where(low, z, 0).softmax(1), scores / torch.where(low, 1, total))


def topk_gate(
    logits: Tensor,
    bias: Tensor | None,
    k: int,
    score: str,
    n_group: int,
    topk_group: int,
    group_score: str,
    group_mask: float,
    renormalize: bool,
    scale: float,
    eps: float,
    temperature: float,
    long_ids: bool,
    statistics: bool,
) -> Gated:
    """Weights and experts ``[T, k]``, and with ``statistics`` counts ``[E]``, sums of probabilities ``[E]`` and log-sum-exps ``[T]``."""
    ids, bad = choose_experts(logits, bias, k, score, n_group, topk_group, group_score, group_mask, temperature)
    z = logits.to(accumulation_dtype(logits, bias)) * (1 / temperature)
    if score == "softmax" and renormalize and eps == 0:
        weight = z.gather(1, ids).softmax(1)
    else:
        weight = (z.softmax(1) if score == "softmax" else z.sigmoid()).gather(1, ids)
        if renormalize:
            weight = weight / (weight.sum(1, keepdim=True) + eps)
    weight = weight * scale + torch.where(bad, torch.nan, 0.0).to(z.dtype)[:, None]
    experts = ids if long_ids else ids.to(torch.int32)
    if not statistics:
        none = z.new_empty(0)
        return weight, experts, logits.new_empty(0, dtype=torch.int32), none, none.clone()
    counts = torch.zeros(z.shape[1], dtype=torch.int32, device=z.device)
    counts = counts.scatter_add(0, ids.reshape(-1), torch.ones_like(ids, dtype=torch.int32).reshape(-1))
    return weight, experts, counts, _shares(z, score).sum(0), z.logsumexp(1)


def _chosen_slopes(
    z: Tensor, ids: Tensor, weight: Tensor, dweight: Tensor, score: str, renormalize: bool, scale: float, eps: float
) -> Tensor:
    """The gradient of z from that of the weights."""
    if score == "softmax" and renormalize and eps == 0:
        # Where the scale is 0 in this arithmetic, so are the weights.
        factor = torch.full((), scale, dtype=weight.dtype, device=weight.device)
        inner = (weight * dweight).sum(1, keepdim=True) / torch.where(factor == 0, 1, factor)
        return torch.zeros_like(z).scatter(1, ids, weight * (dweight - inner))
    scores = z.softmax(1) if score == "softmax" else z.sigmoid()
    chosen = scores.gather(1, ids)
    slopes = scale * dweight
    if renormalize:
        total = chosen.sum(1, keepdim=True) + eps
        slopes = (slopes - (slopes * chosen).sum(1, keepdim=True) / total) / total
    slopes = torch.where(weight.isnan(), torch.nan, slopes)
    if score == "sigmoid":
        return torch.zeros_like(z).scatter(1, ids, slopes * chosen * (1 - chosen))
    return torch.zeros_like(z).scatter(1, ids, slopes * chosen) - scores * (slopes * chosen).sum(1, keepdim=True)


def topk_gate_backward(
    logits: Tensor,
    ids: Tensor,
    weight: Tensor,
    dweight: Tensor | None,
    dprob_sum: Tensor | None,
    dlse: Tensor | None,
    score: str,
    renormalize: bool,
    scale: float,
    eps: float,
    temperature: float,
) -> Tensor:
    """The gradient of the logits."""
    z = logits.to(weight.dtype) * (1 / temperature)
    dz = torch.zeros_like(z)
    if dweight is not None:
        dz = dz + _chosen_slopes(z, ids.long(), weight, dweight, score, renormalize, scale, eps)
    if dprob_sum is not None:
        share = _shares(z, score)
        slopes = share * (dprob_sum - (share * dprob_sum).sum(1, keepdim=True))
        if score == "sigmoid":
            # 1 - score of them, which is 1 where they are low.
            slopes = slopes * (1 - z.sigmoid())
        dz = dz + slopes
    if dlse is not None:
        dz = dz + dlse[:, None] * z.softmax(1)
    return (dz * (1 / temperature)).to(logits.dtype)

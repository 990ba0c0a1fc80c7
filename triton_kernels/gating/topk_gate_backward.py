"""topk_gate's backward: a program takes some rows, computes their scores again and writes the whole gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.triton_kernels.gating.exact import exact_sigmoid
from taskloom.triton_kernels.gating.topk_gate import LEAST_SUM, LEAST_SUM_WIDE, rows_of, tile
from taskloom.triton_kernels.launch import launch, raw
from taskloom.triton_kernels.masked.entries import divided, store_entries, widened


@triton.jit
def topk_gate_backward_kernel(
    logits,
    ids,
    weight,
    dweight,
    dprob_sum,
    dlse,
    out,
    tokens,
    row_stride,
    experts,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    FOR_WEIGHT: tl.constexpr,
    FOR_SUM: tl.constexpr,
    FOR_LSE: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SCALE: tl.constexpr,
    EPS: tl.constexpr,
    FACTOR: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of the logits; where nothing flows, 0."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = token < tokens
    rows = token * row_stride
    expert = tl.arange(0, BLOCK)
    inside = present[:, None] & (expert < experts)[None, :]
    softmax_of_chosen: tl.constexpr = (not SIGMOID) and RENORMALIZE and EPS == 0
    dense: tl.constexpr = (FOR_WEIGHT and not SIGMOID and not softmax_of_chosen) or FOR_LSE or FOR_SUM
    slopes = tl.zeros([ROWS, BLOCK], tl.float64 if WIDE else tl.float32)
    shares = slopes
    center = tl.zeros([ROWS], slopes.dtype)
    total = center + 1.0
    z = slopes
    if dense:
        z = widened(tl.load(logits + rows[:, None] + expert[None, :], mask=inside, other=0), WIDE) * FACTOR
    if FOR_SUM:
        sums = tl.load(dprob_sum + expert, mask=expert < experts, other=0)[None, :]
    if dense:
        center = tl.max(tl.where(inside, z, float("-inf")), axis=1)
        exponentials = tl.where(inside, tl.exp(z - center[:, None]), 0.0)
        total = tl.where(present, tl.sum(exponentials, axis=1), 1.0)
        shares = divided(exponentials, tl.broadcast_to(total[:, None], z.shape), WIDE)
        if FOR_SUM and not SIGMOID:
            slopes += shares * (sums - tl.sum(shares * sums, axis=1)[:, None])
        if FOR_LSE:
            slopes += shares * tl.load(dlse + token, mask=present, other=0)[:, None]
    if FOR_SUM and SIGMOID:
        score = tl.where(inside, exact_sigmoid(z, WIDE), 0.0)
        score_sum = tl.sum(score, axis=1)[:, None]
        low = score_sum < (LEAST_SUM_WIDE if WIDE else LEAST_SUM)
        score_sum = tl.where(low, 1.0, score_sum)
        inner = tl.sum(tl.where(low, shares, score) * sums, axis=1)[:, None] / score_sum
        slopes += (sums - inner) / score_sum * tl.where(low, shares, score * (1.0 - score))
    if FOR_WEIGHT:
        slot = tl.arange(0, SLOTS)
        taken = present[:, None] & (slot < K)[None, :]
        at = token[:, None] * K + slot[None, :]
        chosen = tl.load(ids + at, mask=taken, other=0)
        taken = taken & (chosen >= 0) & (chosen < experts)
        w = tl.load(weight + at, mask=taken, other=0)
        given = tl.load(dweight + at, mask=taken, other=0)
        if softmax_of_chosen:
            added = w * (given - (tl.sum(w * given, axis=1) * (1.0 / SCALE if SCALE != 0 else 0.0))[:, None])
        else:
            own = widened(tl.load(logits + rows[:, None] + chosen, mask=taken, other=0), WIDE) * FACTOR
            if SIGMOID:
                score = exact_sigmoid(own, WIDE)
            else:
                score = divided(tl.exp(own - center[:, None]), tl.broadcast_to(total[:, None], own.shape), WIDE)
            score = tl.where(taken, score, 0.0)
            added = given * SCALE
            if RENORMALIZE:
                score_sum = tl.where(present, tl.sum(score, axis=1) + EPS, 1.0)[:, None]
                added = (added - tl.sum(added * score, axis=1)[:, None] / score_sum) / score_sum
            added = tl.where(w != w, w, added)
            added = added * score
            if SIGMOID:
                added = added * (1.0 - score)
            else:
                slopes -= shares * tl.sum(tl.where(taken, added, 0.0), axis=1)[:, None]
        for place in range(K):
            here = taken & (slot == place)[None, :]
            target = tl.max(tl.where(here, chosen, -1), axis=1)
            amount = tl.sum(tl.where(here, added, 0.0), axis=1)
            slopes += tl.where(expert[None, :] == target[:, None], amount[:, None], 0.0)
    store_entries(out, token[:, None] * experts + expert[None, :], slopes * FACTOR, inside)


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
    """Launch the backward op."""
    tokens, experts = logits.shape
    k = ids.shape[1]
    out = torch.empty((tokens, experts), dtype=logits.dtype, device=logits.device)
    block = max(triton.next_power_of_2(experts), 32)
    rows, warps = tile(tokens, block)
    values, kept = rows_of(logits), weight.contiguous()
    slopes = [kept if one is None else one.contiguous() for one in (dweight, dprob_sum, dlse)]
    launch(
        topk_gate_backward_kernel,
        (triton.cdiv(tokens, rows),),
        raw(values),
        ids.contiguous(),
        kept,
        *slopes,
        raw(out),
        tokens,
        values.stride(0),
        experts,
        K=k,
        SLOTS=triton.next_power_of_2(k),
        FOR_WEIGHT=dweight is not None,
        FOR_SUM=dprob_sum is not None,
        FOR_LSE=dlse is not None,
        SIGMOID=score == "sigmoid",
        RENORMALIZE=renormalize,
        # As it is in the kernel's arithmetic, where it may be 0.
        SCALE=torch.tensor(scale, dtype=weight.dtype).item(),
        EPS=eps,
        FACTOR=1 / temperature,
        WIDE=weight.dtype == torch.float64,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
    )
    return out

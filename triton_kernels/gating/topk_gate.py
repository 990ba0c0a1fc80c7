"""topk_gate: a program takes some rows of logits, with the experts of a group next to each other in whole powers of two."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.triton_kernels.gating.exact import exact_exp, exact_sigmoid, exact_sum, no_key, ordered, unordered
from taskloom.triton_kernels.launch import INTERPRETED, launch, raw
from taskloom.triton_kernels.masked.entries import divided, load_entries, widened

Gated = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
# Where the sum of a row's sigmoids is below it, some are too small to be told from 0: their shares are the softmax of the row.
LEAST_SUM = tl.constexpr(2.0**-100)
LEAST_SUM_WIDE = tl.constexpr(2.0**-960)
# Programs that add up statistics of their own, at most.
_MOST_SUMS = 512


@triton.jit
def _exp(x, EXACT: tl.constexpr, WIDE: tl.constexpr):
    """e^x: to the bit where it decides something; Triton's own of float64 contracts."""
    return exact_exp(x, WIDE) if EXACT or WIDE else tl.exp(x)


@triton.jit
def _log(x, WIDE: tl.constexpr):
    """The logarithm, of float64 by Newton's steps from that of float32 for the same reason."""
    result = tl.log(x.to(tl.float32))
    if WIDE:
        result = result.to(tl.float64)
        result += x * exact_exp(0.0 - result, WIDE) - 1.0
        result += x * exact_exp(0.0 - result, WIDE) - 1.0
    return result


@triton.jit
def _masked_keys(keys, bad, wanted, ROWS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, TWO: tl.constexpr, WIDE: tl.constexpr):
    """Which experts are in the ``wanted`` best groups; rows that have a NaN, now with those whose groups have one."""
    by_group = tl.reshape(keys, (ROWS, GROUPS, SIZE))
    judged = tl.max(by_group, axis=2)
    none = no_key(WIDE)
    if TWO:
        member = tl.arange(0, SIZE)[None, None, :]
        first = tl.min(tl.where(by_group == judged[:, :, None], member, SIZE), axis=2)
        second = tl.max(tl.where(member == first[:, :, None], none, by_group), axis=2)
        there = judged != none
        total = tl.where(there, unordered(judged, WIDE) + unordered(tl.where(there, second, 0), WIDE), 0.0)
        bad = bad | (tl.max((total != total).to(tl.int32), axis=1) != 0)
        judged = tl.where(there, ordered(total, WIDE), none)
    group = tl.arange(0, GROUPS)[None, :]
    kept = tl.zeros([ROWS, GROUPS], tl.int32)
    count = 0
    while count < wanted:
        best = tl.max(judged, axis=1)
        place = tl.min(tl.where(judged == best[:, None], group, GROUPS), axis=1)
        kept = tl.where(group == place[:, None], 1, kept)
        judged = tl.where(group == place[:, None], none, judged)
        count += 1
    spread = tl.reshape(tl.broadcast_to(kept[:, :, None], (ROWS, GROUPS, SIZE)), (ROWS, GROUPS * SIZE))
    return spread != 0, bad


@triton.jit
def topk_gate_kernel(
    logits,
    bias,
    weight,
    ids,
    counts,
    prob_sum,
    lse,
    tokens,
    row_stride,
    experts,
    group_size,
    topk_group,
    steps,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    SIGMOID: tl.constexpr,
    BIAS: tl.constexpr,
    SCORED: tl.constexpr,
    LIMITED: tl.constexpr,
    TWO: tl.constexpr,
    MASKED: tl.constexpr,
    GROUP_MASK: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SCALE: tl.constexpr,
    EPS: tl.constexpr,
    FACTOR: tl.constexpr,
    STATISTICS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The experts of rows and their weights; with STATISTICS each program's sums over its rows."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, GROUPS * SIZE)
    group = column // SIZE
    expert = group * group_size + column % SIZE
    real = (column % SIZE < group_size) & (expert < experts)
    slot = tl.arange(0, SLOTS)
    none = no_key(WIDE)
    counted = tl.zeros([GROUPS * SIZE], tl.int32)
    summed = tl.zeros([GROUPS * SIZE], tl.float64 if WIDE else tl.float32)
    step = 0
    while step < steps:
        token = (program * steps + step) * ROWS + tl.arange(0, ROWS)
        present = token < tokens
        rows = token * row_stride
        inside = present[:, None] & real[None, :]
        x = widened(tl.load(logits + rows[:, None] + expert[None, :], mask=inside, other=0), WIDE)
        z = tl.where(inside, x * FACTOR, float("-inf"))
        softmax_of_chosen: tl.constexpr = (not SIGMOID) and RENORMALIZE and EPS == 0
        center = tl.max(z, axis=1)
        center = tl.where(present, center, 0.0)
        exponentials = tl.zeros_like(z)
        total = tl.zeros_like(center) + 1.0
        if (not SIGMOID and (SCORED or not softmax_of_chosen)) or STATISTICS:
            exponentials = tl.where(inside, _exp(z - center[:, None], SCORED, WIDE), 0.0)
            if SCORED and not SIGMOID:
                total = exact_sum(logits, rows, present, center, experts, FACTOR, ROWS, WIDE)
            else:
                total = tl.sum(exponentials, axis=1)
            total = tl.where(present, total, 1.0)
        choice = x
        if SCORED:
            choice = exact_sigmoid(z, WIDE) if SIGMOID else divided(exponentials, tl.broadcast_to(total[:, None], z.shape), WIDE)
            if BIAS:
                choice += load_entries(bias, expert, real, WIDE)[None, :]
        bad = tl.max((inside & (choice != choice)).to(tl.int32), axis=1) != 0
        keys = tl.where(inside, ordered(choice, WIDE), none)
        if LIMITED:
            kept, bad = _masked_keys(keys, bad, topk_group, ROWS, GROUPS, SIZE, TWO, WIDE)
            if MASKED:
                masked = ordered(tl.zeros_like(choice) + GROUP_MASK, WIDE)
                keys = tl.where(kept | (keys == none), keys, masked)
            else:
                keys = tl.where(kept, keys, none)
        found = tl.zeros([ROWS, SLOTS], tl.int32)
        for place in range(K):
            best = tl.max(keys, axis=1)
            winner = tl.min(tl.where(keys == best[:, None], column[None, :], GROUPS * SIZE - 1), axis=1)
            winner_expert = winner // SIZE * group_size + winner % SIZE
            winner_expert = tl.where(bad | (winner_expert >= experts), place, winner_expert)
            found = tl.where(slot[None, :] == place, winner_expert[:, None], found)
            keys = tl.where(column[None, :] == winner[:, None], none, keys)
            if STATISTICS:
                counted += tl.sum((inside & (expert[None, :] == winner_expert[:, None])).to(tl.int32), axis=0)
        taken = present[:, None] & (slot < K)[None, :]
        w = widened(tl.load(logits + rows[:, None] + found, mask=taken, other=0), WIDE) * FACTOR
        if SIGMOID:
            w = exact_sigmoid(w, WIDE)
        elif softmax_of_chosen:
            w = tl.where(taken, w, float("-inf"))
            w = _exp(w - tl.max(w, axis=1)[:, None], SCORED, WIDE)
        else:
            w = divided(_exp(w - center[:, None], SCORED, WIDE), tl.broadcast_to(total[:, None], w.shape), WIDE)
        w = tl.where(taken, w, 0.0)
        if RENORMALIZE:
            w = divided(w, tl.broadcast_to((tl.sum(w, axis=1) + EPS)[:, None], w.shape), WIDE)
        w = tl.where(bad[:, None], float("nan"), w * SCALE)
        to = token[:, None] * K + slot[None, :]
        tl.store(weight + to, w, mask=taken)
        tl.store(ids + to, found.to(ids.dtype.element_ty), mask=taken)
        if STATISTICS:
            infinite = (center == float("inf")) | (center == float("-inf"))
            clean = tl.max((inside & (x != x)).to(tl.int32), axis=1) == 0
            tl.store(lse + token, tl.where(infinite & clean, center, center + _log(total, WIDE)), mask=present)
            share = exponentials
            share_sum = tl.where(present, tl.sum(share, axis=1), 1.0)
            if SIGMOID:
                share = tl.where(inside, exact_sigmoid(z, WIDE), 0.0)
                sigmoid_sum = tl.sum(share, axis=1)
                low = sigmoid_sum < (LEAST_SUM_WIDE if WIDE else LEAST_SUM)
                share = tl.where(low[:, None], exponentials, share)
                share_sum = tl.where(low, share_sum, sigmoid_sum)
            summed += tl.sum(divided(share, tl.broadcast_to(share_sum[:, None], share.shape), WIDE), axis=0)
        step += 1
    if STATISTICS:
        tl.store(counts + program * experts + expert, counted, mask=real)
        tl.store(prob_sum + program * experts + expert, summed, mask=real)


def rows_of(logits: Tensor) -> Tensor:
    """The logits with a row's entries next to each other; a copy where they are not."""
    return logits if logits.shape[1] <= 1 or logits.stride(1) == 1 else logits.contiguous()


def tile(tokens: int, columns: int) -> tuple[int, int]:
    """Rows of a program and its warps: a warp for a row, several rows of a program where there are many."""
    if INTERPRETED:
        return min(16, triton.next_power_of_2(max(tokens, 1))), 4
    if columns > 512:
        return 1, min(columns // 256, 16)
    return (4, 4) if tokens >= 1024 else (1, 1)


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
    """Launch :func:`taskloom.topk_gate`; statistics of the programs are added up by torch, in order."""
    tokens, experts = logits.shape
    dtype = accumulation_dtype(logits, bias)
    device = logits.device
    limited = topk_group < n_group
    groups = n_group if limited else 1
    size = experts // groups
    masked = limited and group_mask != -math.inf
    two = limited and group_score == "top2"
    columns = {"GROUPS": triton.next_power_of_2(groups), "SIZE": max(triton.next_power_of_2(size), 1 if limited else 32)}
    rows, warps = tile(tokens, columns["GROUPS"] * columns["SIZE"])
    steps = triton.cdiv(tokens, rows * _MOST_SUMS) if statistics else 1
    programs = triton.cdiv(tokens, rows * max(steps, 1))
    weight = torch.empty((tokens, k), dtype=dtype, device=device)
    ids = torch.empty((tokens, k), dtype=torch.int64 if long_ids else torch.int32, device=device)
    summed = programs if statistics else 0
    counts = torch.empty((summed, experts), dtype=torch.int32, device=device)
    prob_sum = torch.empty((summed, experts), dtype=dtype, device=device)
    lse = torch.empty(tokens if statistics else 0, dtype=dtype, device=device)
    values = rows_of(logits)
    given = (raw(values), raw(values if bias is None else bias.contiguous()), weight, ids, counts, prob_sum, lse)
    launch(
        topk_gate_kernel,
        (programs,),
        *given,
        tokens,
        values.stride(0),
        experts,
        size,
        topk_group,
        steps,
        K=k,
        SLOTS=triton.next_power_of_2(k),
        SIGMOID=score == "sigmoid",
        BIAS=bias is not None,
        SCORED=bias is not None or masked or two,
        LIMITED=limited,
        TWO=two,
        MASKED=masked,
        GROUP_MASK=group_mask if masked else 0.0,
        RENORMALIZE=renormalize,
        SCALE=scale,
        EPS=eps,
        FACTOR=1 / temperature,
        STATISTICS=statistics,
        WIDE=dtype == torch.float64,
        ROWS=rows,
        num_warps=warps,
        **columns,
    )
    if not statistics:
        return weight, ids, counts.view(-1), prob_sum.view(-1), lse
    return weight, ids, counts.sum(0, dtype=torch.int32), prob_sum.sum(0), lse

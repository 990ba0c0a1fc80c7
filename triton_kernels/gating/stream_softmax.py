"""stream_softmax_mix: a program takes one sequence and a chunk of the experts, tile by tile with an online softmax."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.ops.gating import _stream_products
from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.triton_kernels.launch import INTERPRETED, flat, launch
from taskloom.triton_kernels.masked.entries import divided, load_entries

# Experts of a chunk, whose sums are one partial: it alone decides the bits. And entries that the partials of one launch may have.
CHUNK, ENTRIES = 8192, 1 << 22


@triton.jit
def _center(largest):
    """What scores are taken relative to: 0 where none is finite, so that -inf stays -inf."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def stream_softmax_partial_kernel(
    x,
    y,
    experts,
    largest_of,
    sum_of,
    weighted_of,
    pairs,
    dims,
    count,
    first_chunk,
    FACTOR: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest score of each pair among a chunk's experts, and the sums relative to it."""
    sequence, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, PAIRS)
    known = pair < pairs
    target = load_entries(y, sequence * pairs + pair, known, WIDE)
    zero = tl.zeros([PAIRS], tl.float64 if WIDE else tl.float32)
    largest, total, mixed = zero + float("-inf"), zero, zero
    start = (first_chunk + chunk).to(tl.int64) * CHUNK
    stop = tl.minimum(start + CHUNK, count)
    before = tl.broadcast_to(tl.maximum(pair - 1, 0)[:, None], [PAIRS, BLOCK])
    while start < stop:
        expert = start + tl.arange(0, BLOCK)
        present = expert < stop
        predicted = tl.zeros([PAIRS, BLOCK], tl.float64 if WIDE else tl.float32)
        d = 0
        while d < dims:
            inputs = load_entries(x, (sequence * pairs + pair) * dims + d, known, WIDE)
            weights = load_entries(experts, expert * dims + d, present, WIDE)
            predicted += inputs[:, None] * weights[None, :]
            d += 1
        errors = target[:, None] - predicted
        # The sum up to the pair before: taking the pair's own square off again would let its target in by rounding.
        squares = tl.gather(tl.cumsum(errors * errors, axis=0), before, axis=0)
        scores = tl.where((pair > 0)[:, None], squares, 0.0) * FACTOR
        scores = tl.where(present[None, :], scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, axis=1))
        center = _center(higher)
        shrink = tl.exp(largest - center)
        likelihood = tl.exp(scores - center[:, None])
        total = total * shrink + tl.sum(likelihood, axis=1)
        mixed = mixed * shrink + tl.sum(likelihood * predicted, axis=1)
        largest = higher
        start += BLOCK
    place = (chunk.to(tl.int64) * tl.num_programs(0) + sequence) * pairs + pair
    tl.store(largest_of + place, largest, mask=known)
    tl.store(sum_of + place, total, mask=known)
    tl.store(weighted_of + place, mixed, mask=known)


@triton.jit
def stream_softmax_fold_kernel(
    largest_of,
    sum_of,
    weighted_of,
    largest_so_far,
    sum_so_far,
    weighted_so_far,
    pred,
    lse,
    entries,
    chunks,
    STARTS: tl.constexpr,
    ENDS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add chunks, in order, to what there is so far; after the last one, the predictions and logarithms."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < entries
    zero = tl.zeros([BLOCK], tl.float64 if WIDE else tl.float32)
    if STARTS:
        largest, total, mixed = zero + float("-inf"), zero, zero
    else:
        largest = tl.load(largest_so_far + place, mask=inside, other=0.0)
        total = tl.load(sum_so_far + place, mask=inside, other=1.0)
        mixed = tl.load(weighted_so_far + place, mask=inside, other=0.0)
    chunk = 0
    while chunk < chunks:
        at = place + chunk * entries
        top = tl.load(largest_of + at, mask=inside, other=0.0)
        higher = tl.maximum(largest, top)
        center = _center(higher)
        shrink, now = tl.exp(largest - center), tl.exp(top - center)
        total = shrink * total + now * tl.load(sum_of + at, mask=inside, other=1.0)
        mixed = shrink * mixed + now * tl.load(weighted_of + at, mask=inside, other=0.0)
        largest = higher
        chunk += 1
    if ENDS:
        tl.store(pred + place, divided(mixed, total, WIDE), mask=inside)
        tl.store(lse + place, _center(largest) + tl.log(total), mask=inside)
    else:
        tl.store(largest_so_far + place, largest, mask=inside)
        tl.store(sum_so_far + place, total, mask=inside)
        tl.store(weighted_so_far + place, mixed, mask=inside)


def stream_softmax_mix(x: Tensor, y: Tensor, experts: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Launch :func:`taskloom.stream_softmax_mix`: chunks of experts in waves, so that memory does not grow with their number."""
    batch, pairs, dims = x.shape
    dtype = accumulation_dtype(x, y, experts)
    wide = dtype == torch.float64
    pred, lse = (torch.empty(y.shape, dtype=dtype, device=y.device) for _ in range(2))
    entries, chunks = batch * pairs, triton.cdiv(len(experts), CHUNK)
    if entries == 0:
        return pred, lse
    wave = min(chunks, max(1, ENTRIES // entries))
    partials = torch.empty((3, wave, entries), dtype=dtype, device=y.device)
    so_far = torch.empty((3, entries), dtype=dtype, device=y.device)
    given = (flat(x), flat(y), flat(experts))
    padded = triton.next_power_of_2(pairs)
    block = max(16, min(2048 // padded, 128)) if not INTERPRETED else min(1024, triton.next_power_of_2(len(experts)))
    constants = {"FACTOR": -0.5 / sigma**2, "CHUNK": CHUNK, "WIDE": wide, "PAIRS": padded, "BLOCK": block}
    for first in range(0, chunks, wave):
        together = min(wave, chunks - first)
        sizes = (pairs, dims, len(experts), first)
        launch(stream_softmax_partial_kernel, (batch, together), *given, *partials, *sizes, **constants)
        ends = {"STARTS": first == 0, "ENDS": first + together == chunks}
        folded = (*partials, *so_far, pred, lse, entries, together)
        launch(stream_softmax_fold_kernel, (triton.cdiv(entries, 128),), *folded, **ends, WIDE=wide, BLOCK=128)
    return pred, lse


def stream_softmax_mix_backward(for_pred: Tensor | None, for_lse: Tensor | None, x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The backward op by torch's products, in chunks of experts."""
    y, experts, *given = others
    return _stream_products.stream_softmax_mix_backward(x, y, experts, for_pred, for_lse, *given)

"""Kernels of sparse_merge: a program takes a block of entries of all tasks through the stages.

Three tables have a row per task: ``words`` (int64: address of the tuned tensor, address of the packed mask, key and seed of the random
words, bound of the words that keep an entry), ``numbers`` (in the dtype of the arithmetic: weight, factor, tall mask lambda) and
``probabilities`` (float32: DELLA's lowest keep probability and its spread). ``cuts`` holds each task's band of magnitudes, ``ranks`` the
ascending ranks of its entries in their rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.random import philox_impl

from taskloom.triton_kernels.masked.entries import (
    divided,
    listed_pointer,
    load_bits,
    load_entries,
    magnitude_bits,
    program_offsets,
    store_entries,
)
from taskloom.triton_kernels.masked.magnitude_mask import between_cuts

WORDS = tl.constexpr(5)
NUMBERS = tl.constexpr(3)

ALL = tl.constexpr(0)
MAGNITUDE = tl.constexpr(1)
MASK = tl.constexpr(2)
DROPOUT = tl.constexpr(3)
RANK_DROPOUT = tl.constexpr(4)

NONE = tl.constexpr(0)
SIGN_SUM = tl.constexpr(1)
SELECTED = tl.constexpr(1)
TALL = tl.constexpr(2)
WEIGHTED_MEAN = tl.constexpr(1)
DISJOINT_MEAN = tl.constexpr(2)


@triton.jit
def random_words(row, BLOCK: tl.constexpr):
    """The 32-bit words of this program's entries: word i % 4 of the Philox block of counter (i // 4, key) under the task's seed."""
    counter = tl.program_id(0).to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    key = tl.load(row + 2)
    seed = tl.load(row + 3)
    same = tl.zeros_like(counter)
    first, second, third, fourth = philox_impl(
        (counter & 0xFFFFFFFF).to(tl.uint32),
        ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32),
        ((same + key) & 0xFFFFFFFF).to(tl.uint32),
        (((same + key) >> 32) & 0xFFFFFFFF).to(tl.uint32),
        (seed & 0xFFFFFFFF).to(tl.uint32),
        ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32),
    )
    return tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth)).to(tl.int64)


@triton.jit
def rank_probabilities(probabilities, ranks, offsets, inside, row_length):
    """DELLA's keep probabilities in float32: linear in the ascending rank in the row."""
    last = tl.maximum(row_length - 1, 1).to(tl.float32)
    rank = tl.load(ranks + offsets, mask=inside, other=0).to(tl.float32)
    return tl.load(probabilities) + tl.div_rn(rank, tl.zeros_like(rank) + last) * tl.load(probabilities + 1)


@triton.jit
def keep_limit(probability):
    """``probability * 2^32``, rounded to nearest even: words below it keep an entry."""
    scaled = probability.to(tl.float64) * 4294967296.0
    low = tl.floor(scaled)
    whole = low.to(tl.int64)
    rest = scaled - low
    return whole + ((rest > 0.5) | ((rest == 0.5) & (whole % 2 == 1))).to(tl.int64)


@triton.jit
def task_delta(base_values, first, words, task, offsets, inside, HAS_BASE: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr):
    """``tuned - base`` of one task; ``first`` gives the type of all tuned tensors."""
    delta = load_entries(listed_pointer(words, task * WORDS, first, ALIGNED), offsets, inside, WIDE)
    if HAS_BASE:
        delta -= base_values
    return delta


@triton.jit
def task_kept(
    delta,
    words,
    cuts,
    ranks,
    probabilities,
    task,
    offsets,
    inside,
    numel,
    row_length,
    SELECT: tl.constexpr,
    BY_ROW: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Which entries of one task's delta survive."""
    row = words + task * WORDS
    kept = inside
    if SELECT == MAGNITUDE:
        own = cuts + task.to(tl.int64) * 4
        if BY_ROW:
            own = cuts + task.to(tl.int64) * (numel // row_length) * 4
        kept = inside & between_cuts(magnitude_bits(delta, WIDE).to(tl.int64), offsets, own, inside, row_length, BY_ROW)
    elif SELECT == MASK:
        kept = load_bits(tl.load(row + 1).to(tl.pointer_type(tl.uint8)), offsets, inside)
    elif SELECT == DROPOUT:
        kept = inside & (random_words(row, BLOCK) < tl.load(row + 4))
    elif SELECT == RANK_DROPOUT:
        own = ranks + task.to(tl.int64) * numel
        limit = keep_limit(rank_probabilities(probabilities + 2 * task, own, offsets, inside, row_length))
        kept = inside & (random_words(row, BLOCK) < limit)
    return kept


@triton.jit
def task_part(
    delta,
    kept,
    numbers,
    ranks,
    probabilities,
    task,
    offsets,
    inside,
    numel,
    row_length,
    BY_RANK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``weight * (factor * delta)`` where kept, else 0; BY_RANK: the factor is 1 / keep probability of the entry's rank."""
    if BY_RANK:
        own = ranks + task.to(tl.int64) * numel
        probability = rank_probabilities(probabilities + 2 * task, own, offsets, inside, row_length).to(delta.dtype)
        factor = divided(tl.zeros_like(probability) + 1.0, probability, WIDE)
    else:
        factor = tl.load(numbers + task * NUMBERS + 1)
    scaled = tl.where(kept, factor * tl.where(kept, delta, 0.0), 0.0)
    return tl.load(numbers + task * NUMBERS) * scaled


@triton.jit
def elected_sum(
    origin,
    first,
    words,
    numbers,
    cuts,
    ranks,
    probabilities,
    offsets,
    inside,
    numel,
    row_length,
    tasks,
    SELECT: tl.constexpr,
    BY_ROW: tl.constexpr,
    BY_RANK: tl.constexpr,
    ELECT: tl.constexpr,
    HAS_BASE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum whose sign is elected: of the contributions, or of their signs."""
    signed = tl.zeros_like(origin)
    task = tl.full([], 0, tl.int32)
    while task < tasks:
        delta = task_delta(origin, first, words, task, offsets, inside, HAS_BASE, WIDE, ALIGNED)
        kept = task_kept(delta, words, cuts, ranks, probabilities, task, offsets, inside, numel, row_length, SELECT, BY_ROW, WIDE, BLOCK)
        part = task_part(delta, kept, numbers, ranks, probabilities, task, offsets, inside, numel, row_length, BY_RANK, WIDE)
        if ELECT == SIGN_SUM:
            signed += part
        else:
            signed += (part > 0).to(signed.dtype) - (part < 0).to(signed.dtype)
        task += 1
    return signed


@triton.jit
def sparse_merge_norms_kernel(
    base,
    first,
    words,
    cuts,
    ranks,
    probabilities,
    sums,
    numel,
    row_length,
    SELECT: tl.constexpr,
    BY_ROW: tl.constexpr,
    HAS_BASE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program's share of one task's L1 norms before and after selection, in float64: sums[task, program, 2]."""
    task = tl.program_id(1)
    offsets = program_offsets(BLOCK)
    inside = offsets < numel
    origin = load_entries(base, offsets, inside, WIDE)
    delta = task_delta(origin, first, words, task, offsets, inside, HAS_BASE, WIDE, ALIGNED)
    kept = task_kept(delta, words, cuts, ranks, probabilities, task, offsets, inside, numel, row_length, SELECT, BY_ROW, WIDE, BLOCK)
    size = tl.abs(delta).to(tl.float64)
    own = sums + 2 * (task.to(tl.int64) * tl.num_programs(0) + tl.program_id(0))
    tl.store(own, tl.sum(size, axis=0))
    tl.store(own + 1, tl.sum(tl.where(kept, size, 0.0), axis=0))


@triton.jit
def sparse_merge_signs_kernel(
    base,
    first,
    words,
    numbers,
    cuts,
    ranks,
    probabilities,
    sums,
    numel,
    row_length,
    tasks,
    SELECT: tl.constexpr,
    BY_ROW: tl.constexpr,
    BY_RANK: tl.constexpr,
    ELECT: tl.constexpr,
    HAS_BASE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Elected positive entries less elected negative ones of each program's."""
    offsets = program_offsets(BLOCK)
    inside = offsets < numel
    origin = load_entries(base, offsets, inside, WIDE)
    signed = elected_sum(
        origin,
        first,
        words,
        numbers,
        cuts,
        ranks,
        probabilities,
        offsets,
        inside,
        numel,
        row_length,
        tasks,
        SELECT,
        BY_ROW,
        BY_RANK,
        ELECT,
        HAS_BASE,
        WIDE,
        ALIGNED,
        BLOCK,
    )
    tl.store(sums + tl.program_id(0), tl.sum((signed > 0).to(tl.int64) - (signed < 0).to(tl.int64), axis=0))


@triton.jit
def sparse_merge_statistics_kernel(
    base,
    first,
    words,
    numbers,
    cuts,
    ranks,
    probabilities,
    counts,
    dots,
    numel,
    row_length,
    tasks,
    SELECT: tl.constexpr,
    BY_ROW: tl.constexpr,
    BY_RANK: tl.constexpr,
    HAS_BASE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program's share of what a merge counts.

    ``counts[tasks + 2, programs]``: kept entries per task, entries in conflict, deltas that are not finite; ``dots[pairs, programs]``:
    inner products of the deltas, the upper triangle row by row.
    """
    offsets = program_offsets(BLOCK)
    inside = offsets < numel
    origin = load_entries(base, offsets, inside, WIDE)
    program = tl.program_id(0).to(tl.int64)
    positive = tl.zeros([BLOCK], tl.int32)
    negative = tl.zeros([BLOCK], tl.int32)
    unbounded = tl.zeros([BLOCK], tl.int32)
    own_dots = dots + program
    task = tl.full([], 0, tl.int32)
    while task < tasks:
        delta = task_delta(origin, first, words, task, offsets, inside, HAS_BASE, WIDE, ALIGNED)
        kept = task_kept(delta, words, cuts, ranks, probabilities, task, offsets, inside, numel, row_length, SELECT, BY_ROW, WIDE, BLOCK)
        part = task_part(delta, kept, numbers, ranks, probabilities, task, offsets, inside, numel, row_length, BY_RANK, WIDE)
        positive |= (part > 0).to(tl.int32)
        negative |= (part < 0).to(tl.int32)
        finite = tl.abs(delta) < float("inf")
        unbounded |= 1 - finite.to(tl.int32)
        tl.store(counts + task.to(tl.int64) * tl.num_programs(0) + program, tl.sum(kept.to(tl.int32), axis=0))
        other = task
        while other < tasks:
            beside = task_delta(origin, first, words, other, offsets, inside, HAS_BASE, WIDE, ALIGNED)
            tl.store(own_dots, tl.sum((delta * beside).to(tl.float64), axis=0))
            own_dots += tl.num_programs(0)
            other += 1
        task += 1
    own_counts = counts + task.to(tl.int64) * tl.num_programs(0) + program
    tl.store(own_counts, tl.sum(positive & negative, axis=0))
    tl.store(own_counts + tl.num_programs(0), tl.sum(unbounded, axis=0))


@triton.jit
def sparse_merge_kernel(
    base,
    first,
    words,
    numbers,
    cuts,
    ranks,
    probabilities,
    scalars,
    zero_sign,
    out,
    numel,
    row_length,
    tasks,
    consensus_k,
    SELECT: tl.constexpr,
    BY_ROW: tl.constexpr,
    BY_RANK: tl.constexpr,
    ELECT: tl.constexpr,
    VOTE: tl.constexpr,
    COMBINE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    SAME: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``base + scale * combine(elect(rescale(select(tuned - base))))``; scalars: scale, and the divisor of a weighted mean."""
    offsets = program_offsets(BLOCK)
    inside = offsets < numel
    origin = load_entries(base, offsets, inside, WIDE)
    if ELECT != NONE:
        signed = elected_sum(
            origin,
            first,
            words,
            numbers,
            cuts,
            ranks,
            probabilities,
            offsets,
            inside,
            numel,
            row_length,
            tasks,
            SELECT,
            BY_ROW,
            BY_RANK,
            ELECT,
            HAS_BASE,
            WIDE,
            ALIGNED,
            BLOCK,
        )
        elected = tl.where(signed > 0, 1.0, tl.where(signed < 0, -1.0, tl.load(zero_sign)))
    total = tl.zeros_like(origin)
    weight_sum = tl.zeros_like(origin)
    votes = tl.zeros([BLOCK], tl.int32)
    task = tl.full([], 0, tl.int32)
    while task < tasks:
        delta = task_delta(origin, first, words, task, offsets, inside, HAS_BASE, WIDE, ALIGNED)
        kept = task_kept(delta, words, cuts, ranks, probabilities, task, offsets, inside, numel, row_length, SELECT, BY_ROW, WIDE, BLOCK)
        part = task_part(delta, kept, numbers, ranks, probabilities, task, offsets, inside, numel, row_length, BY_RANK, WIDE)
        if ELECT != NONE:
            counts = part * elected > 0
            part = tl.where(counts, part, 0.0)
        else:
            counts = part != 0
        total += part
        if COMBINE == DISJOINT_MEAN:
            weight_sum += tl.where(counts, tl.load(numbers + task * NUMBERS), 0.0)
        if VOTE == SELECTED:
            votes += kept.to(tl.int32)
        task += 1
    if COMBINE == DISJOINT_MEAN:
        total = divided(total, tl.where(weight_sum == 0, 1.0, weight_sum), WIDE)
    elif COMBINE == WEIGHTED_MEAN:
        total = divided(total, weight_sum + tl.load(scalars + 1), WIDE)
    change = tl.load(scalars) * total
    if VOTE == TALL:
        task = tl.full([], 0, tl.int32)
        while task < tasks:
            delta = task_delta(origin, first, words, task, offsets, inside, HAS_BASE, WIDE, ALIGNED)
            own = tl.load(numbers + task * NUMBERS) * delta
            rest = tl.abs(total - own)
            votes += (tl.abs(own) > tl.load(numbers + task * NUMBERS + 2) * rest).to(tl.int32)
            task += 1
    if VOTE != NONE:
        change = tl.where(votes >= consensus_k, change, 0.0)
    if HAS_BASE:
        change = origin + change
    if SAME:
        # Threads of a program may hold different entries of different tensors: all have read before one writes.
        tl.debug_barrier()
    store_entries(out, offsets, change, inside)

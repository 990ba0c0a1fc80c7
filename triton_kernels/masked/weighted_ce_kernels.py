"""The kernels of weighted_ce: what is seen of logits, and the loss's gradient with respect to them."""

from __future__ import annotations

import triton
import triton.language as tl

from taskloom.triton_kernels.masked.entries import load_entries, store_entries, widened


@triton.jit
def factors(values, EXACT: tl.constexpr):
    """Loaded entries as ``tl.dot`` takes them. EXACT: as float32, which holds every value; int16 holds the bits of bfloat16 then."""
    result = widened(values, False) if EXACT else values
    return result


@triton.jit
def merged_sum(total, top, logits, here):
    """The sum of exp(logit - here) over what was seen before, with its largest logit ``top``, and a tile of new logits."""
    # Where every logit is -infinity, a difference from it would be NaN.
    origin = tl.where(here == float("-inf"), 0.0, here)
    return total * tl.exp(top - origin) + tl.sum(tl.exp(logits - origin[:, None]), axis=1)


@triton.jit
def see_products_kernel(
    hidden,
    head,
    places,
    targets,
    largest,
    sums,
    chosen,
    count,
    vocabulary,
    span,
    WIDTH: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """The largest logit and the sum of exponentials of a block of rows over ``span`` words, and the logits of their targets.

    Logits are products of rows of hidden, picked by ``places``, and of the head; they live in registers, a tile at a time.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < count
    place = tl.load(places + rows, mask=inside, other=0)
    target = tl.load(targets + place, mask=inside, other=-1)
    part = tl.program_id(1)
    top = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    first = part * span
    end = tl.minimum(first + span, vocabulary)
    while first < end:
        columns = first + tl.arange(0, BLOCK_COLUMNS)
        known = columns < end
        logits = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        left = hidden + place[:, None] * WIDTH
        right = head + columns[None, :].to(tl.int64) * WIDTH
        for start in range(0, WIDTH, BLOCK_WIDTH):
            depth = start + tl.arange(0, BLOCK_WIDTH)
            a = tl.load(left + depth[None, :], mask=inside[:, None] & (depth < WIDTH)[None, :], other=0)
            b = tl.load(right + depth[:, None], mask=(depth < WIDTH)[:, None] & known[None, :], other=0)
            logits = tl.dot(factors(a, EXACT), factors(b, EXACT), logits, input_precision="ieee")
        met = inside & (target >= first) & (target < end) & (target < first + BLOCK_COLUMNS)
        is_target = columns[None, :] == target[:, None]
        tl.store(chosen + rows, tl.sum(tl.where(is_target, logits, 0.0), axis=1), mask=met)
        logits = tl.where(known[None, :], logits, float("-inf"))
        here = tl.maximum(top, tl.max(logits, axis=1))
        total = merged_sum(total, top, logits, here)
        top = here
        first += BLOCK_COLUMNS
    to = part.to(tl.int64) * count + rows
    tl.store(largest + to, top, mask=inside)
    tl.store(sums + to, total, mask=inside)


@triton.jit
def see_logits_kernel(
    logits,
    places,
    targets,
    largest,
    sums,
    chosen,
    begin,
    columns,
    COMPACT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same of one row of logits, of the words from ``begin`` on; COMPACT: only the picked rows are there."""
    row = tl.program_id(0)
    place = tl.load(places + row)
    target = tl.load(targets + place) - begin
    from_row = logits + (row.to(tl.int64) if COMPACT else place) * columns
    top = tl.full([1], float("-inf"), tl.float64 if WIDE else tl.float32)
    total = tl.zeros_like(top)
    first = 0
    while first < columns:
        offsets = first + tl.arange(0, BLOCK)
        inside = offsets < columns
        values = tl.where(inside, load_entries(from_row, offsets, inside, WIDE), float("-inf"))[None, :]
        here = tl.maximum(top, tl.max(values, axis=1))
        total = merged_sum(total, top, values, here)
        top = here
        first += BLOCK
    only = tl.arange(0, 1)
    tl.store(largest + row + only, top)
    tl.store(sums + row + only, total)
    met = (target >= 0) & (target < columns)
    tl.store(chosen + row + only, load_entries(from_row, target + only, met, WIDE), mask=met)


@triton.jit
def slopes_kernel(
    logits,
    places,
    targets,
    log_sum_exp,
    coefficient,
    out,
    begin,
    columns,
    COMPACT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row's coefficient * (softmax - onehot) over the words from ``begin`` on; zeros where the coefficient is 0."""
    row = tl.program_id(0).to(tl.int64)
    # Blocks of one, because the interpreter spreads a condition that is a plain scalar as a number.
    only = tl.arange(0, 1)
    place = (tl.load(places + row) if COMPACT else row) + only
    factor = tl.load(coefficient + place)
    picked = factor != 0
    origin = tl.load(log_sum_exp + place, mask=picked, other=0)
    target = tl.load(targets + place, mask=picked, other=-1) - begin
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    values = load_entries(logits + row * columns, offsets, inside & picked, WIDE)
    slopes = factor * tl.exp(values - origin)
    slopes = tl.where(offsets == target, slopes - factor, slopes)
    store_entries(out + row * columns, offsets, tl.where(picked, slopes, 0.0), inside)

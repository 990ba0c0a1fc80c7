"""Kernels of masked_adamw_ and masked_sgd_: a program takes a block of one of many parameters.

``table`` has a row of 64-bit words for each parameter, ``owners`` the row of each program. ``before`` holds how many entries are active in
all programs before each one, for packed masks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from taskloom.triton_kernels.masked.entries import divided, listed_pointer, load_bits, load_entries, store_entries

# Columns: addresses, sizes, and numbers as the bits of float64.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
FIRST = tl.constexpr(2)
SECOND = tl.constexpr(3)
ACTIVE = tl.constexpr(4)
NUMEL = tl.constexpr(5)
LISTED = tl.constexpr(6)
PROGRAM = tl.constexpr(7)
NUMBERS = tl.constexpr(8)
COLUMNS = tl.constexpr(15)

ALL = tl.constexpr(0)
PACKED = tl.constexpr(1)
INDEXED = tl.constexpr(2)


@triton.jit
def own_row(table, owners):
    """The row of this program's parameter."""
    return table + tl.load(owners + tl.program_id(0)) * COLUMNS


@triton.jit
def own_first(row, BLOCK: tl.constexpr):
    """The first of this program's entries, or of its places in the list of indices."""
    return (tl.program_id(0).to(tl.int64) - tl.load(row + PROGRAM)) * BLOCK


@triton.jit
def number(row, place: tl.constexpr, WIDE: tl.constexpr):
    """A number of the row, rounded once to the arithmetic."""
    value = tl.load(row + NUMBERS + place).to(tl.float64, bitcast=True)
    if not WIDE:
        value = value.to(tl.float32)
    return value


@triton.jit
def count_active_kernel(table, owners, packed, counts, BLOCK: tl.constexpr):
    """How many of each program's entries a packed mask sets."""
    row = own_row(table, owners)
    first = own_first(row, BLOCK)
    places = tl.arange(0, BLOCK // 8)
    left = tl.load(row + NUMEL) - first - 8 * places
    byte = tl.load(listed_pointer(row, ACTIVE, packed, False) + first // 8 + places, mask=left > 0, other=0).to(tl.int32)
    bits = byte & ((1 << tl.minimum(left, 8).to(tl.int32)) - 1)
    bits = tl.where(left > 0, bits, 0)
    bits = bits - ((bits >> 1) & 0x55)
    bits = (bits & 0x33) + ((bits >> 2) & 0x33)
    bits = (bits + (bits >> 4)) & 0x0F
    tl.store(counts + tl.program_id(0), tl.sum(bits, axis=0).to(tl.int64))


@triton.jit
def check_indices_kernel(table, owners, indices, wrong, BLOCK: tl.constexpr):
    """How many of each program's indices are outside of the parameter or not above the one before."""
    row = own_row(table, owners)
    places = own_first(row, BLOCK) + tl.arange(0, BLOCK)
    inside = places < tl.load(row + LISTED)
    listed = listed_pointer(row, ACTIVE, indices, False)
    here = tl.load(listed + places, mask=inside, other=0).to(tl.int64)
    earlier = tl.load(listed + places - 1, mask=inside & (places > 0), other=-1).to(tl.int64)
    bad = inside & ((here <= earlier) | (here >= tl.load(row + NUMEL)))
    tl.store(wrong + tl.program_id(0), tl.sum(bad.to(tl.int64), axis=0))


@triton.jit
def active_entries(active, before, row, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program: entries of the parameter, which of them are active, and the places of their state."""
    first = own_first(row, BLOCK)
    own = first + tl.arange(0, BLOCK)
    if KIND == PACKED:
        chosen = load_bits(listed_pointer(row, ACTIVE, active, False), own, own < tl.load(row + NUMEL))
        base = tl.load(before + tl.program_id(0)) - tl.load(before + tl.load(row + PROGRAM))
        places = base + tl.cumsum(chosen.to(tl.int32), 0).to(tl.int64) - 1
        offsets = own
    elif KIND == INDEXED:
        chosen = own < tl.load(row + LISTED)
        places = own
        offsets = tl.load(listed_pointer(row, ACTIVE, active, False) + own, mask=chosen, other=0).to(tl.int64)
    else:
        chosen = own < tl.load(row + NUMEL)
        places = own
        offsets = own
    return offsets, chosen, places


@triton.jit
def masked_adamw_kernel(
    param,
    grad,
    state,
    active,
    table,
    owners,
    before,
    KIND: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One AdamW step of active entries; ``param``, ``grad``, ``state`` and ``active`` give the types of what the table points to."""
    row = own_row(table, owners)
    offsets, chosen, places = active_entries(active, before, row, KIND, BLOCK)
    target = listed_pointer(row, PARAM, param, ALIGNED)
    exp_avg = listed_pointer(row, FIRST, state, ALIGNED)
    exp_avg_sq = listed_pointer(row, SECOND, state, ALIGNED)
    value = load_entries(target, offsets, chosen, WIDE)
    slope = load_entries(listed_pointer(row, GRAD, grad, ALIGNED), offsets, chosen, WIDE)
    mean = tl.load(exp_avg + places, mask=chosen, other=0)
    square = tl.load(exp_avg_sq + places, mask=chosen, other=0)
    if MAXIMIZE:
        slope = slope * -1.0
    mean = mean + (slope - mean) * number(row, 1, WIDE)
    square = square * number(row, 2, WIDE) + (number(row, 3, WIDE) * slope) * slope
    root = tl.sqrt(square) if WIDE else tl.sqrt_rn(square)
    scale = divided(root, tl.zeros_like(root) + number(row, 4, WIDE), WIDE) + number(row, 5, WIDE)
    tl.store(exp_avg + places, mean, mask=chosen)
    tl.store(exp_avg_sq + places, square, mask=chosen)
    store_entries(target, offsets, value * number(row, 0, WIDE) + divided(number(row, 6, WIDE) * mean, scale, WIDE), chosen)


@triton.jit
def masked_sgd_kernel(
    param,
    grad,
    state,
    active,
    table,
    owners,
    before,
    KIND: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    DECAYS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One SGD step of active entries; arguments as of masked_adamw_kernel."""
    row = own_row(table, owners)
    offsets, chosen, places = active_entries(active, before, row, KIND, BLOCK)
    target = listed_pointer(row, PARAM, param, ALIGNED)
    value = load_entries(target, offsets, chosen, WIDE)
    slope = load_entries(listed_pointer(row, GRAD, grad, ALIGNED), offsets, chosen, WIDE)
    if MAXIMIZE:
        slope = slope * -1.0
    if DECAYS:
        slope = slope + number(row, 3, WIDE) * value
    if MOMENTUM:
        buffer = listed_pointer(row, FIRST, state, ALIGNED)
        momentum = number(row, 1, WIDE)
        velocity = tl.load(buffer + places, mask=chosen, other=0)
        # In a parameter's first step the buffer takes the gradient, whatever it held.
        velocity = tl.where(number(row, 4, WIDE) != 0, slope, velocity * momentum + number(row, 2, WIDE) * slope)
        tl.store(buffer + places, velocity, mask=chosen)
        slope = slope + momentum * velocity if NESTEROV else velocity
    store_entries(target, offsets, value + number(row, 0, WIDE) * slope, chosen)

"""The arithmetic of scores that decide which experts are chosen: the same bits as on every other backend, and integers in their order."""

from __future__ import annotations

import triton
import triton.language as tl

from taskloom.triton_kernels.masked.entries import divided, widened

SUM_LANES = tl.constexpr(32)


@triton.jit
def exact_exp(x, WIDE: tl.constexpr):
    """e^x in steps that are rounded one by one; what would be subnormal is 0."""
    if WIDE:
        shifted = x * 1.4426950408889634 + 6755399441055744.0
        power = shifted - 6755399441055744.0
        rest = (x - power * 6.93147180369123816490e-01) - power * 1.90821492927058770002e-10
        total = rest * (1.0 / 6227020800) + 1.0 / 479001600
        total = total * rest + 1.0 / 39916800
        total = total * rest + 1.0 / 3628800
        total = total * rest + 1.0 / 362880
        total = total * rest + 1.0 / 40320
        total = total * rest + 1.0 / 5040
        scale = ((shifted.to(tl.int64, bitcast=True) << 52) + 0x3FE0000000000000).to(tl.float64, bitcast=True)
        lowest: tl.constexpr = -708.39641853226408
        highest: tl.constexpr = 709.78271289338397
    else:
        shifted = x * 1.44269504 + 12582912.0
        power = shifted - 12582912.0
        rest = (x - power * 0.693359375) - power * -2.12194440e-4
        total = tl.zeros_like(x) + 1.0 / 5040
        scale = ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F000000).to(tl.float32, bitcast=True)
        lowest: tl.constexpr = -87.33654
        highest: tl.constexpr = 88.72283
    total = total * rest + 1.0 / 720
    total = total * rest + 1.0 / 120
    total = total * rest + 1.0 / 24
    total = total * rest + 1.0 / 6
    total = total * rest + 0.5
    total = total * rest + 1.0
    total = total * rest + 1.0
    value = tl.where(x < lowest, 0.0, (total * scale) * 2.0)
    return tl.where(x > highest, float("inf"), value)


@triton.jit
def exact_sigmoid(z, WIDE: tl.constexpr):
    """``1 / (1 + e^-z)``."""
    return divided(tl.zeros_like(z) + 1.0, 1.0 + exact_exp(0.0 - z, WIDE), WIDE)


@triton.jit
def _folded(sums, HALF: tl.constexpr):
    """Halves of each row onto each other; by masks, because a reshape would give its layout to all that meets the sum."""
    place = tl.arange(0, 2 * HALF)[None, None, :]
    target = tl.arange(0, HALF)[None, :, None]
    # Two values and zeros: the same in any order.
    return tl.sum(tl.where(place % HALF == target, sums[:, None, :], 0.0), axis=2)


@triton.jit
def exact_sum(logits, rows, inside_rows, center, experts, FACTOR: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """The rows' sums of e^(z - center): every 32nd expert in order, then halves of the 32 sums onto each other."""
    lane = tl.arange(0, SUM_LANES)
    sums = tl.zeros([ROWS, SUM_LANES], tl.float64 if WIDE else tl.float32)
    first = 0
    while first < experts:
        expert = first + lane
        inside = inside_rows[:, None] & (expert < experts)[None, :]
        x = widened(tl.load(logits + rows[:, None] + expert[None, :], mask=inside, other=0), WIDE)
        sums += tl.where(inside, exact_exp(x * FACTOR - center[:, None], WIDE), 0.0)
        first += SUM_LANES
    return tl.sum(_folded(_folded(_folded(_folded(sums, 16), 8), 4), 2), axis=1)


@triton.jit
def ordered(values, WIDE: tl.constexpr):
    """Integers in the order of the values, both zeros alike; the least integer is none of them."""
    plain = tl.where(values == 0, 0.0, values)
    if WIDE:
        bits = plain.to(tl.int64, bitcast=True)
        result = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = plain.to(tl.int32, bitcast=True)
        result = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return result


@triton.jit
def unordered(keys, WIDE: tl.constexpr):
    """The values of such integers."""
    if WIDE:
        result = (keys ^ ((keys >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
    else:
        result = (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return result


@triton.jit
def no_key(WIDE: tl.constexpr):
    """What is below every value's integer."""
    key = tl.full((), -0x8000000000000000, tl.int64) if WIDE else tl.full((), -0x80000000, tl.int32)
    return key

"""Scores in an arithmetic that every backend repeats to the bit, because they decide which experts are chosen.

Each product, sum and quotient is rounded on its own; the exponential and the order of the sum are those of the kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SUM_LANES = 32


@dataclass(frozen=True)
class _Constants:
    """Of the exponential in one dtype; ln 2 is in two parts, the first of so few bits that its products with exponents are exact."""

    integer: torch.dtype
    lowest: float
    highest: float
    rounder: float
    ln2_high: float
    ln2_low: float
    terms: int
    mantissa: int
    one_half: int


_CONSTANTS = {
    torch.float32: _Constants(
        torch.int32, -87.33654, 88.72283, 12582912.0, 0.693359375, -2.12194440e-4, terms=8, mantissa=23, one_half=0x3F000000
    ),
    torch.float64: _Constants(
        torch.int64,
        -708.39641853226408,
        709.78271289338397,
        6755399441055744.0,
        6.93147180369123816490e-01,
        1.90821492927058770002e-10,
        terms=14,
        mantissa=52,
        one_half=0x3FE0000000000000,
    ),
}


def exact_exp(x: Tensor) -> Tensor:
    """e^x of float32 or float64, to about one unit in the last place; what would be subnormal is 0."""
    known = _CONSTANTS[x.dtype]
    log2_e = 1.44269504 if x.dtype == torch.float32 else 1.4426950408889634
    lowest, highest = x.new_tensor(known.lowest), x.new_tensor(known.highest)
    kept = torch.where(x < lowest, lowest, x)
    kept = torch.where(kept > highest, highest, kept)
    shifted = kept * log2_e + known.rounder
    power = shifted - known.rounder
    rest = (kept - power * known.ln2_high) - power * known.ln2_low
    total = torch.full_like(x, 1 / math.factorial(known.terms - 1))
    for term in range(known.terms - 2, -1, -1):
        total = total * rest + 1 / math.factorial(term)
    # Half of the power of two, doubled after, so that the largest one does not overflow on its own.
    scale = ((shifted.view(known.integer) << known.mantissa) + known.one_half).view(x.dtype)
    value = torch.where(x < lowest, torch.zeros_like(x), (total * scale) * 2)
    return torch.where(x > highest, torch.full_like(x, torch.inf), value)


def exact_sum(values: Tensor) -> Tensor:
    """Row sums ``[T]`` of ``[T, E]``: every 32nd entry in order, then halves of the 32 sums onto each other."""
    blocks = torch.nn.functional.pad(values, (0, -values.shape[1] % SUM_LANES)).split(SUM_LANES, dim=1)
    sums = blocks[0]
    for block in blocks[1:]:
        sums = sums + block
    width = SUM_LANES // 2
    while width:
        sums = sums[:, :width] + sums[:, width:]
        width //= 2
    return sums[:, 0]


def exact_softmax(z: Tensor) -> Tensor:
    """The softmax of each row."""
    exponentials = exact_exp(z - z.amax(1, keepdim=True))
    return exponentials / exact_sum(exponentials)[:, None]


def exact_sigmoid(z: Tensor) -> Tensor:
    """``1 / (1 + e^-z)``."""
    return torch.ones_like(z) / (1 + exact_exp(0 - z))

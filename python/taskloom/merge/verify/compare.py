"""Compares the entries of a tensor with what they must be, and keeps the largest differences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taskloom.merge.verify.recompute import Expected

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def last_place(values: Tensor) -> Tensor:
    """The unit in the last place of each value in its own dtype, as float64; the smallest subnormal near zero."""
    limits = torch.finfo(values.dtype)
    exponents = torch.frexp(values.double()).exponent
    unit = torch.ldexp(torch.full_like(values, limits.eps, dtype=torch.float64), exponents - 1)
    return unit.clamp(min=limits.smallest_normal * limits.eps)


def _places(values: Tensor) -> Tensor:
    """Integers that are ordered as the values are, one apart for neighbours."""
    bits = values.contiguous().view(_INTEGERS[values.element_size()]).long()
    lowest = -(2 ** (8 * values.element_size() - 1))
    return torch.where(bits < 0, lowest - bits, bits)


@dataclass
class Comparison:
    """Differences of one tensor, summed over its pieces.

    Attributes
    ----------
    entries, differing, wrong
        Entries compared; those whose bits differ (two NaNs are alike); those that differ by more than the criterion allows.
    max_abs, max_ulp
        The largest difference, as a number and in units in the last place of the output's dtype. Not finite where one side is not.
    squared_difference, squared_norm
        Sums over the finite entries, in float64.
    first_wrong
        Index, value found and value expected of the first wrong entry.
    """

    entries: int = 0
    differing: int = 0
    wrong: int = 0
    max_abs: float = 0.0
    max_ulp: float = 0.0
    squared_difference: float = 0.0
    squared_norm: float = 0.0
    first_wrong: tuple[int, float, float] | None = None

    @property
    def relative_norm(self) -> float:
        """The norm of the difference over that of what is expected."""
        if self.squared_difference == 0:
            return 0.0
        return (self.squared_difference / self.squared_norm) ** 0.5 if self.squared_norm > 0 else float("inf")

    def add(self, got: Tensor, expected: Expected) -> None:
        """Count one piece: flat tensors of the output's dtype."""
        wanted = expected.values
        self.entries += got.numel()
        self.squared_norm += float(torch.nan_to_num(wanted.double(), 0.0, 0.0, 0.0).square().sum())
        integer = _INTEGERS[got.element_size()]
        differs = (got.view(integer) != wanted.contiguous().view(integer)) & ~(got.isnan() & wanted.isnan())
        places = differs.nonzero().squeeze(1)
        if len(places) == 0:
            return
        wrong = _is_wrong(got[places], wanted[places], None if expected.slack is None else expected.slack[places])
        chosen = wanted[places]
        if expected.otherwise is not None and expected.undecided is not None and expected.slack is not None:
            other = expected.otherwise[places]
            fell_otherwise = wrong & expected.undecided[places] & ~_is_wrong(got[places], other, expected.slack[places])
            chosen = torch.where(fell_otherwise, other, chosen)
            wrong &= ~fell_otherwise
        self._count(got[places], chosen)
        self.differing += len(places)
        self.wrong += int(wrong.sum())
        if self.first_wrong is None and bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            self.first_wrong = (expected.begin + int(places[first]), float(got[places][first]), float(chosen[first]))

    def _count(self, got: Tensor, wanted: Tensor) -> None:
        difference = (got.double() - wanted.double()).abs()
        finite = difference.isfinite()
        self.squared_difference += float(torch.where(finite, difference, 0).square().sum())
        self.max_abs = max(self.max_abs, float(torch.where(finite, difference, torch.inf).max()))
        steps = (_places(got).double() - _places(wanted).double()).abs()
        near = steps < 2.0**52
        exact = (_places(got) - _places(wanted)).abs().double()
        self.max_ulp = max(self.max_ulp, float(torch.where(near, exact, steps).max()))


def _is_wrong(got: Tensor, wanted: Tensor, slack: Tensor | None) -> Tensor:
    """Which of some differing entries are off by more than one unit in the last place and their slack; all without a slack."""
    if slack is None:
        return torch.ones_like(got, dtype=torch.bool)
    # A comparison with NaN is false, so that NaN on one side is wrong.
    return ~((got.double() - wanted.double()).abs() <= last_place(wanted) + slack)

"""Which descending magnitude ranks of a segment are kept, and checks of what decides it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from taskloom._selection import band_ranks
from taskloom.ops.masked._bands import check_choice, segment_length

Granularity = Literal["tensor", "row"]
OnOverflow = Literal["drop", "density"]


def check_real(op: str, argument: str, value: object) -> float:
    """``value`` as a float; TypeError unless it is a number, ValueError unless it is finite."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{op}: {argument}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{op}: {argument}: expected a finite number, got {value}")
    return float(value)


def check_density(op: str, argument: str, value: object) -> float:
    """``value`` as a float in (0, 1]."""
    number = check_real(op, argument, value)
    if not 0 < number <= 1:
        raise ValueError(f"{op}: {argument}: expected a kept share in (0, 1], got {value}")
    return number


def check_gamma(op: str, argument: str, value: object) -> float:
    """``value`` as a float in [0, 1)."""
    number = check_real(op, argument, value)
    if not 0 <= number < 1:
        raise ValueError(f"{op}: {argument}: expected a removed share in [0, 1), got {value}")
    return number


@dataclass(frozen=True)
class BandRule:
    """How density and gamma become ranks; ``op`` names the caller in errors."""

    op: str
    granularity: Granularity
    outliers_first: bool
    on_overflow: OnOverflow

    def __post_init__(self) -> None:
        check_choice(self.op, "granularity", self.granularity, ("tensor", "row"))
        check_choice(self.op, "on_overflow", self.on_overflow, ("drop", "density"))

    def length(self, tensor: Tensor) -> int:
        """Entries of one segment of a tensor."""
        return segment_length(tensor, self.granularity)

    def ranks(self, tensor: Tensor, density: float, gamma: float) -> tuple[int, int]:
        """The kept ranks ``begin <= rank < end`` of each of a tensor's segments.

        What has no dimension is no row, and stays whole with ``granularity="row"`` (official code).
        """
        if self.granularity == "row" and tensor.dim() == 0:
            return 0, 1
        return band_ranks(self.length(tensor), density, gamma, on_overflow=self.on_overflow, outliers_first=self.outliers_first)

    def is_clipped(self, tensor: Tensor, density: float, band: tuple[int, int]) -> bool:
        """Whether fewer entries are kept than density says, for want of room below the outliers."""
        begin, end = band
        return self.outliers_first and end == self.length(tensor) and end - begin < int(density * end)


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite, in one reading pass that stores nothing."""
    if tensor.numel() == 0:
        return True
    return all(bool(torch.isfinite(bound)) for bound in torch.aminmax(tensor.detach()))

"""Reads the arguments that say which magnitude ranks are meant: rank, density, gamma, scope, threshold."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any, Literal

from torch import Tensor

from taskloom._selection import band_ranks

Scope = Literal["tensor", "row"]
OnOverflow = Literal["density", "drop"]

_SEED_END = 1 << 64


def check_choice(op: str, name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{op}: {name}: expected one of {', '.join(choices)}, got {value!r}")


def check_number(op: str, name: str, value: Any, low: float | None = None, high: float | None = None) -> None:
    """Raise unless ``value`` is a finite number between ``low`` and ``high``."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name}: expected a number, got {type(value).__name__}")
    # Comparisons, because math.isfinite cannot be traced; a NaN fails them.
    if not (-inf < value < inf and (low is None or value >= low) and (high is None or value <= high)):
        bounds = "a finite number" if low is None else f"at least {low:g}" if high is None else f"a number in [{low:g}, {high:g}]"
        raise ValueError(f"{op}: {name}: expected {bounds}, got {value}")


def check_word(op: str, name: str, value: int) -> None:
    """Raise unless ``value`` is an int of 64 bits without a sign."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{op}: {name}: expected an int, got {type(value).__name__}")
    if not 0 <= value < _SEED_END:
        raise ValueError(f"{op}: {name}: expected 0 <= {name} < 2**64, got {value}")


def check_ranks(op: str, ranks: Sequence[int], length: int, of: str) -> None:
    """Raise unless every rank counts entries of a segment of ``length`` entries, which is ``of`` something."""
    for rank in ranks:
        if isinstance(rank, (bool, float, Tensor)):
            raise TypeError(f"{op}: rank: expected int, got {type(rank).__name__}")
        if rank < 0 or rank > length:
            raise ValueError(f"{op}: rank: expected 0 <= rank <= {length}, the entries of {of}, got {rank}")


def segment_length(tensor: Tensor, scope: str) -> int:
    """Entries that are ranked together: all of the tensor, or of its last dimension."""
    if scope == "tensor":
        return tensor.numel()
    return tensor.shape[-1] if tensor.dim() > 0 else 1


def rank_band(
    op: str,
    length: int,
    scope: str,
    *,
    rank: int | Sequence[int] | None,
    density: float | None,
    gamma: float,
    at_least_one: bool,
    on_overflow: OnOverflow,
) -> tuple[int, int]:
    """The kept range of descending ranks of a segment, from exactly one of rank and density."""
    if (rank is None) == (density is None):
        raise ValueError(f"{op}: rank, density: expected exactly one of them, got {'neither' if rank is None else 'both'}")
    check_choice(op, "on_overflow", on_overflow, ("density", "drop"))
    if density is not None:
        check_number(op, "density", density, 0, 1)
        check_number(op, "gamma", gamma, 0, 1)
        return band_ranks(length, density, gamma, at_least_one=at_least_one, on_overflow=on_overflow)
    if gamma != 0:
        raise ValueError(f"{op}: gamma: goes with density; give rank as (begin, end) instead")
    band: Sequence[Any] = rank if isinstance(rank, Sequence) else (0, rank)
    if len(band) != 2:
        raise ValueError(f"{op}: rank: expected an int or (begin, end), got {len(band)} ranks")
    begin, end = band
    check_ranks(op, (begin, end), length, f"a {scope}")
    if begin > end:
        raise ValueError(f"{op}: rank: expected begin <= end, got ({begin}, {end})")
    return begin, end

"""Medians with their spread, as numbers and as text."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence


def summary(samples: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(samples), "lowest": min(samples), "highest": max(samples)}


def spread(figures: Mapping[str, float], digits: int = 2) -> str:
    return f"{figures['median']:.{digits}f} ({figures['lowest']:.{digits}f}-{figures['highest']:.{digits}f})"

"""The volume that a set of points dominates."""

from __future__ import annotations

import math
from collections.abc import Sequence


def _volume(points: list[tuple[float, ...]]) -> float:
    """The volume between the origin and the points, all positive: slices between one value of the last coordinate and the next."""
    if len(points[0]) == 1:
        return max(point[0] for point in points)
    ordered = sorted(points, key=lambda point: point[-1], reverse=True)
    below = [point[-1] for point in ordered[1:]] + [0.0]
    slices = []
    for place, (point, next_value) in enumerate(zip(ordered, below, strict=True)):
        if point[-1] > next_value:
            slices.append((point[-1] - next_value) * _volume([other[:-1] for other in ordered[: place + 1]]))
    return math.fsum(slices)


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """The exact volume of what is better than the reference and no better than some point; higher values are better.

    Parameters
    ----------
    points
        A value per task each. Values that are better when lower are negated, here and in the reference.
    reference
        The worst value that counts, per task.

    Returns
    -------
    float
        0 where no point is better than the reference in every task.

    Raises
    ------
    ValueError
        If numbers of values differ, there is no task, or a value is not finite.

    Notes
    -----
    Sweeps over slices of the last task, in each of them over the one before: about n^(K - 1) log n steps for n points and K tasks. Source:
    the hypervolume indicator, Zitzler and Thiele, IEEE TEVC 1999.
    """
    worst = [float(value) for value in reference]
    rows = [tuple(float(value) for value in point) for point in points]
    if not worst or any(len(row) != len(worst) for row in rows):
        raise ValueError(f"hypervolume: points: expected {len(worst)} values each, as reference has, got {[len(row) for row in rows]}")
    if not all(math.isfinite(value) for row in (worst, *rows) for value in row):
        raise ValueError("hypervolume: expected finite values")
    above = [tuple(value - low for value, low in zip(row, worst, strict=True)) for row in rows]
    better = [row for row in above if min(row) > 0]
    return _volume(better) if better else 0.0

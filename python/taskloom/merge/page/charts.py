"""Line charts as inline SVG.

They are made here, with the standard library, and not by matplotlib: loading it takes longer than a small merge, it would make
``--report`` need an extra, and its SVG has fixed colours and sizes. These charts take their colours from the page's style, light or dark,
and are as wide as the page while their text keeps its size: places along an axis are percentages, and only the lines are stretched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from xml.etree.ElementTree import Element

from taskloom.merge.page.elements import Child, element

COLOURS = 10
_DASHES = ("", "6 4", "2 3", "9 3 2 3")
_MOST_TICKS = 8

# What lies closer together is one value: a tenth of it can no longer be told from zero.
_SMALLEST_SPAN = 1e-290

# With more places than this the points are drawn small.
_FEW_PLACES = 24


@dataclass(frozen=True)
class Series:
    """One line: its name, a value per place (None leaves a gap), and the name of its colour in the page's style."""

    label: str
    values: Sequence[float | None]
    colour: str
    dash: str = ""


def model_series(labels: Sequence[str], values: Sequence[Sequence[float | None]]) -> list[Series]:
    """A line per model; beyond the tenth the colours come again with another dash."""
    return [
        Series(label, line, f"s{index % COLOURS}", _DASHES[index // COLOURS % len(_DASHES)])
        for index, (label, line) in enumerate(zip(labels, values, strict=True))
    ]


def nice_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) whose first is at most ``low`` and last at least ``high``."""
    span = high - low
    if not _SMALLEST_SPAN < span < math.inf:
        return [low, low + 1]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if span / (factor * power) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [position * step for position in range(first, last + 1)]


def whole_ticks(places: Sequence[int]) -> list[int]:
    """At most eight whole numbers between the first place and the last."""
    step = max(1, round(nice_ticks(0, max(1, places[-1] - places[0]), _MOST_TICKS - 1)[1]))
    return [place for place in range(places[0], places[-1] + 1) if place % step == 0] or [places[0]]


@dataclass(frozen=True)
class _Axes:
    places: Sequence[int]
    low: float
    high: float

    def across(self, place: float) -> float:
        first, last = self.places[0], self.places[-1]
        return 50.0 if first == last else 100 * (place - first) / (last - first)

    def down(self, value: float) -> float:
        return 100 * (self.high - value) / (self.high - self.low)


def _per_cent(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") + "%"


def _grid(axes: _Axes, ticks: Sequence[float], text: Callable[[float], str]) -> list[Element]:
    drawn = []
    for tick in ticks:
        height = _per_cent(axes.down(tick))
        drawn.append(element("line", {"class": "grid", "x1": "0", "x2": "100%", "y1": height, "y2": height}))
        drawn.append(element("text", {"class": "y", "x": "0", "dx": "-8", "y": height, "dy": "0.32em"}, text(tick)))
    for place in whole_ticks(axes.places):
        drawn.append(element("text", {"class": "x", "x": _per_cent(axes.across(place)), "y": "100%", "dy": "18"}, str(place)))
    return drawn


def _polylines(axes: _Axes, series: Series) -> list[Element]:
    drawn = []
    for known, run in groupby(zip(axes.places, series.values, strict=True), key=lambda pair: pair[1] is not None):
        points = [f"{10 * axes.across(place):.1f},{10 * axes.down(value):.1f}" for place, value in run if value is not None]
        if known and len(points) > 1:
            attributes = {"class": f"line {series.colour}", "points": " ".join(points), "vector-effect": "non-scaling-stroke"}
            drawn.append(element("polyline", attributes | ({"stroke-dasharray": series.dash} if series.dash else {})))
    return drawn


def _markers(axes: _Axes, series: Series) -> list[Element]:
    return [
        element("circle", {"class": series.colour, "cx": _per_cent(axes.across(place)), "cy": _per_cent(axes.down(value)), "r": "3"})
        for place, value in zip(axes.places, series.values, strict=True)
        if value is not None
    ]


def _hover(axes: _Axes, lines: Sequence[Series], text: Callable[[float | None], str]) -> list[Element]:
    """A strip over each place that names all of its values."""
    strips = []
    for index, place in enumerate(axes.places):
        middle = axes.across(place)
        before = axes.across(axes.places[index - 1]) if index else 0.0
        after = axes.across(axes.places[index + 1]) if index + 1 < len(axes.places) else 100.0
        left, right = (before + middle) / 2 if index else 0.0, (middle + after) / 2 if index + 1 < len(axes.places) else 100.0
        shown = "\n".join([f"layer {place}", *(f"{series.label}: {text(series.values[index])}" for series in lines)])
        attributes = {"class": "strip", "x": _per_cent(left), "width": _per_cent(right - left), "y": "0", "height": "100%"}
        strips.append(element("rect", attributes, element("title", None, shown)))
    return strips


def legend(lines: Sequence[Series]) -> Element:
    """The names of the lines, each beside a piece of it."""
    items = element("ul", {"class": "legend"})
    for series in lines:
        stroke = {"class": f"line {series.colour}", "x1": "0", "x2": "26", "y1": "6", "y2": "6"}
        key = element(
            "svg",
            {"width": "26", "height": "12", "aria-hidden": "true"},
            element("line", stroke | ({"stroke-dasharray": series.dash} if series.dash else {})),
            element("circle", {"class": series.colour, "cx": "13", "cy": "6", "r": "3"}),
        )
        items.append(element("li", None, key, element("bdi", None, series.label)))
    return items


def line_chart(
    name: str,
    title: str,
    description: str,
    places: Sequence[int],
    lines: Sequence[Series],
    *,
    text: Callable[[float | None], str],
    tick: Callable[[float], str] | None = None,
    high: float | None = None,
) -> Element:
    """A chart of lines over the layers, as a figure with a caption and a legend.

    Parameters
    ----------
    name
        Prefix of the ids within the page.
    title, description
        Caption, and what a screen reader says of the picture.
    places
        Whole numbers in rising order, at least one.
    lines
        The lines, each with a value per place.
    text, tick
        Write a value, and a value beside the axis (default: the same way).
    high
        Upper end of the vertical axis; None means a round number above the largest value. Zero is always on the axis.
    """
    values = [0.0, *(value for series in lines for value in series.values if value is not None)]
    ticks = nice_ticks(min(values), max(values) if high is None else high)
    axes = _Axes(places, ticks[0], ticks[-1])
    curves = element(
        "svg", {"class": "curves", "width": "100%", "height": "100%", "viewBox": "0 0 1000 1000", "preserveAspectRatio": "none"}
    )
    for series in lines:
        curves.extend(_polylines(axes, series))
    drawn: list[Child] = [*_grid(axes, ticks, tick or text), *_hover(axes, lines, text), curves]
    for series in lines:
        drawn += _markers(axes, series)
    drawn.append(element("text", {"class": "x", "x": "50%", "y": "100%", "dy": "36"}, "layer"))
    picture = element(
        "svg",
        {
            "class": "chart many" if len(places) > _FEW_PLACES else "chart",
            "role": "img",
            "aria-labelledby": f"{name}-title {name}-description",
        },
        element("desc", {"id": f"{name}-description"}, description),
        *drawn,
    )
    caption = element("figcaption", {"id": f"{name}-title"}, title)
    return element("figure", None, caption, legend(lines), element("div", {"class": "plot"}, picture))

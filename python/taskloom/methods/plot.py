"""The plot of a method's result: a panel per claim, a bar per arm, a dot per seed."""

from __future__ import annotations

import io
from typing import Any

from taskloom.methods.result import ClaimResult, MethodResult

_INK = "#1f2933"
_MUTED = "#7b8794"
_OURS = "#2f6f9f"
_BASELINE = "#b8c2cc"
_COLOURS = 24


def _panel(axes: Any, claim: ClaimResult) -> None:
    arms = list(claim.values)
    places = range(len(arms))
    colours = [_BASELINE if arm in claim.baselines else _OURS for arm in arms]
    axes.barh(places, list(claim.means.values()), color=colours, height=0.66)
    for place, arm in zip(places, arms, strict=True):
        numbers = claim.values[arm]
        axes.plot(numbers, [place] * len(numbers), "o", color=_INK, markersize=4, markeredgecolor="white", markeredgewidth=0.6)
    axes.set_yticks(places, arms)
    axes.invert_yaxis()
    axes.set_xlabel(claim.metric, fontsize=9, color=_MUTED)
    verdicts = "\n".join(f"{'holds' if one.held else 'does not hold'} ({one.over}): {one.text}" for one in claim.inequalities)
    axes.set_title(f"{claim.name}: {claim.statement}\n{verdicts}", fontsize=9, loc="left", color=_INK, wrap=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=9, length=0)


def plot_result(result: MethodResult) -> bytes:
    """The plot as PNG bytes; needs matplotlib and pillow, which comes with it."""
    from matplotlib.figure import Figure
    from PIL import Image

    heights = [1.2 + 0.36 * len(claim.values) + 0.2 * len(claim.inequalities) for claim in result.claims]
    figure = Figure(figsize=(8.6, sum(heights) + 0.6), layout="constrained")
    panels = figure.subplots(len(result.claims), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, claim in zip(panels[:, 0], result.claims, strict=True):
        _panel(axes, claim)
    figure.suptitle(f"{result.title}: {result.verdict}\nbar = mean, dots = seeds, grey = baselines", fontsize=10, color=_INK)
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    # Few colours in large areas: a palette takes a quarter of the bytes, which matters for a picture on a page.
    Image.open(drawn).convert("RGB").quantize(_COLOURS).save(small, format="png", optimize=True)
    return small.getvalue()

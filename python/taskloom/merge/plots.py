"""Figures of a merge: kept density and sign conflicts by layer, cosines between task vectors, magnitudes of the deltas."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskloom.merge.errors import MergeError
from taskloom.merge.layers import by_layer, model_labels
from taskloom.merge.report import MergeReport

if TYPE_CHECKING:
    from taskloom.merge.execute import TensorStats

_EXPONENT_BIAS = 127

# Cosines beyond this are drawn on a dark ground.
_DARK = 0.7


def require_matplotlib() -> None:
    """Raise MergeError where matplotlib is missing, before any work starts."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MergeError("plots need matplotlib, which is not installed: pip install 'taskloom[plot]'")


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _labels(models: Sequence[str]) -> list[str]:
    # matplotlib leaves labels with a leading underscore out of legends.
    return [label.lstrip("_") or "model" for label in model_labels(models)]


def _plot_layers(report: MergeReport, path: Path) -> None:
    layers = by_layer(report)
    numbers = [layer.layer for layer in layers]
    figure, axes = _figure(8, 4.5)
    for number, model in enumerate(_labels(report.models)):
        axes.plot(numbers, [layer.kept_density[number] for layer in layers], marker="o", label=model)
    axes.plot(numbers, [layer.conflict_rate for layer in layers], color="black", linestyle="--", marker="x", label="sign conflicts")
    axes.set(xlabel="layer", ylabel="share of entries", ylim=(0, 1.02), title=f"{report.method}: kept density and sign conflicts")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    figure.savefig(path, dpi=150)


def _plot_cosines(report: MergeReport, path: Path) -> None:
    size = max(5.0, 2.0 + 0.8 * len(report.models))
    figure, axes = _figure(size + 1, size)
    values = [[float("nan") if cell is None else cell for cell in row] for row in report.total.cosines]
    image = axes.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r")
    labels = _labels(report.models)
    ticks = range(len(labels))
    axes.set_xticks(ticks, labels, rotation=45, ha="right")
    axes.set_yticks(ticks, labels)
    for row in ticks:
        for column in ticks:
            value = values[row][column]
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if abs(value) > _DARK else "black")
    axes.set_title("cosine between task vectors")
    figure.colorbar(image)
    figure.savefig(path, dpi=150)


def _plot_magnitudes(report: MergeReport, stats: Sequence[TensorStats], path: Path) -> None:
    figure, axes = _figure(8, 4.5)
    for number, model in enumerate(_labels(report.models)):
        counts = [0] * 256
        for tensor in stats:
            if tensor.magnitude_histogram:
                counts = [total + count for total, count in zip(counts, tensor.magnitude_histogram[number], strict=True)]
        used = [exponent for exponent, count in enumerate(counts) if count]
        if used:
            span = range(used[0], used[-1] + 1)
            axes.step([exponent - _EXPONENT_BIAS for exponent in span], [counts[exponent] for exponent in span], where="post", label=model)
    axes.set(xlabel="binary exponent of |delta|", ylabel="entries", yscale="log", title="magnitudes of the task vectors")
    axes.legend()
    figure.savefig(path, dpi=150)


def write_plots(report: MergeReport, stats: Sequence[TensorStats], folder: Path) -> list[Path]:
    """Write PNG files into ``folder``: ``layers.png``, ``cosines.png``, ``magnitudes.png``.

    The first is left out where no merged tensor belongs to a layer; where nothing was merged there is nothing to draw.
    """
    if not report.total.cosines:
        return []
    folder.mkdir()
    written = []
    if by_layer(report):
        written.append(folder / "layers.png")
        _plot_layers(report, written[-1])
    written += [folder / "cosines.png", folder / "magnitudes.png"]
    _plot_cosines(report, written[-2])
    _plot_magnitudes(report, stats, written[-1])
    return written

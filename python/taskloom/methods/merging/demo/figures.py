"""The report's figures, as PNG bytes."""

from __future__ import annotations

import io
from typing import Any

from taskloom.methods.merging.demo.results import DemoResults, Row

LABELS = {
    "pre-trained": "Pre-trained",
    "single-task": "Single-task models",
    "linear": "Plain average",
    "task_arithmetic": "Task arithmetic",
    "ties": "TIES",
    "dare_ties": "DARE + TIES",
    "breadcrumbs": "Breadcrumbs",
    "consensus_ta": "Consensus TA",
    "tall_restored": "TALL restored",
}
_INK = "#1f2933"
_MUTED = "#7b8794"
_MERGED = "#2f6f9f"
_REFERENCE = "#b8c2cc"
_RESTORED = "#2a9d6f"


def _canvas(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_REFERENCE)
    axes.tick_params(colors=_INK, labelsize=9, length=0)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=180)
    return buffer.getvalue()


def _colour(row: Row) -> str:
    if row.seconds is not None:
        return _MERGED
    return _RESTORED if row.name == "tall_restored" else _REFERENCE


def accuracy_bars(results: DemoResults) -> bytes:
    """Mean test accuracy of each row, with the tasks as dots."""
    figure, axes = _canvas(7.6, 0.42 * len(results.rows) + 0.8)
    places = range(len(results.rows))
    axes.barh(places, [row.mean for row in results.rows], color=[_colour(row) for row in results.rows], height=0.66)
    for place, row in zip(places, results.rows, strict=True):
        axes.plot(row.accuracy, [place] * len(row.accuracy), "o", color=_INK, markersize=4, markeredgecolor="white", markeredgewidth=0.6)
        axes.text(1.02, place, f"{row.mean:.3f}", va="center", fontsize=9, color=_INK)
    axes.axvline(results.row("single-task").mean, color=_MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_yticks(places, [LABELS[row.name] for row in results.rows])
    axes.set(xlim=(0, 1.1), xticks=[0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel("test accuracy: bar = mean, dots = tasks, dashed = single-task mean", fontsize=9, color=_MUTED)
    axes.invert_yaxis()
    return _png(figure)


def _grid(
    values: list[list[float | None]],
    rows: list[str],
    columns: list[str],
    limits: tuple[float, float],
    palette: str,
    cell_width: float = 0.62,
) -> bytes:
    """A table of numbers on coloured cells."""
    figure, axes = _canvas(1.4 + cell_width * len(columns), 0.55 + 0.4 * len(rows))
    shown = [[float("nan") if cell is None else cell for cell in row] for row in values]
    low, high = limits
    axes.imshow(shown, vmin=low, vmax=high, cmap=palette, aspect="auto")
    axes.spines[:].set_visible(False)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.xaxis.tick_top()
    for line, row in enumerate(shown):
        for column, cell in enumerate(row):
            dark = (cell - low) / (high - low) > 0.62
            axes.text(column, line, f"{cell:.2f}", ha="center", va="center", fontsize=8.5, color="white" if dark else _INK)
    return _png(figure)


def _task_columns(results: DemoResults) -> list[str]:
    return [f"task {task}" for task in range(results.tasks)]


def task_heat_map(results: DemoResults) -> bytes:
    """Test accuracy of each row on each task."""
    rows: list[list[float | None]] = [list(row.accuracy) for row in results.rows]
    return _grid(rows, [LABELS[row.name] for row in results.rows], _task_columns(results), (0.3, 1.05), "Blues")


def _short_columns(results: DemoResults) -> list[str]:
    return [f"t{task}" for task in range(results.tasks)]


def cosine_matrix(results: DemoResults) -> bytes:
    """Cosine of each pair of task vectors."""
    names = _short_columns(results)
    return _grid(results.cosines, names, names, (0.0, 1.0), "Purples", cell_width=0.48)


def kept_density(results: DemoResults) -> bytes:
    """Share of each task vector that each merge selected."""
    merges = [row for row in results.merges if row.name != "linear"]
    values: list[list[float | None]] = [list(row.kept_density or []) for row in merges]
    return _grid(values, [LABELS[row.name] for row in merges], _short_columns(results), (0.0, 1.1), "Greens", cell_width=0.48)


def storage_bars(results: DemoResults) -> bytes:
    """Bytes of separate checkpoints, of the TALL archive by parts, and of one merged model."""
    compression = results.compression
    figure, axes = _canvas(7.6, 1.9)
    merged = results.row("task_arithmetic").bytes_written or 0
    parts = [
        ("base", [0, compression.base_bytes, 0], _REFERENCE),
        ("multi-task vector", [0, compression.vector_bytes, 0], _MERGED),
        (f"{results.tasks} packed masks, headers", [0, compression.mask_bytes + compression.header_bytes, 0], _RESTORED),
        ("fine-tuned checkpoints", [compression.separate_bytes, 0, 0], "#d9822b"),
        ("one merged model", [0, 0, merged], "#8d6cab"),
    ]
    left = [0.0, 0.0, 0.0]
    for label, sizes, colour in parts:
        widths = [size / 1e6 for size in sizes]
        axes.barh(range(3), widths, left=left, color=colour, height=0.62, label=label)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, total in enumerate(left):
        axes.text(total + 0.01 * max(left), place, f"{total:.2f} MB", va="center", fontsize=9, color=_INK)
    axes.set_yticks(range(3), [f"{results.tasks} checkpoints", "TALL archive", "One merged model"])
    axes.set_xlim(0, 1.12 * max(left))
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=len(parts), fontsize=8, frameon=False)
    return _png(figure)

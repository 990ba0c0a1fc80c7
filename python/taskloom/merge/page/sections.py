"""The parts of the page above the table of tensors: summary, models, cosines, layers; and below it: recipe, files, origin."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from xml.etree.ElementTree import Element

from taskloom.merge.layers import LayerFigures, mean_cosine
from taskloom.merge.page.charts import Series, line_chart, model_series
from taskloom.merge.page.elements import (
    MINUS,
    NO_VALUE,
    Child,
    breakable,
    cosine,
    count,
    duration,
    element,
    heading,
    lines,
    number,
    percent,
    size,
    table,
    tick_percent,
)
from taskloom.merge.report import MergeReport
from taskloom.merge.stages import METHODS

# With more models than this the cosines off the diagonal are estimated.
_EXACT_COSINES = 8

# With more pairs than this a chart of all of them is a tangle.
_MOST_PAIRS = 6


def vectors(report: MergeReport) -> str:
    """What norms and cosines are of: the deltas from the base, or the values of the models themselves."""
    method = METHODS.get(report.method)
    has_deltas = method.base == "required" if method is not None else report.base_model is not None
    return "delta" if has_deltas else "values"


def section(name: str, title: str, *children: Child) -> Element:
    """A part of the page with a heading that can be linked to."""
    head = element("h2", {"id": f"{name}-heading"}, title)
    return element("section", {"id": name, "aria-labelledby": f"{name}-heading"}, head, *children)


def _note(*children: Child) -> Element:
    return element("p", {"class": "note"}, *children)


def _cells(*values: Child) -> list[Element]:
    return [element("td", None, value) for value in values]


def summary(report: MergeReport) -> Element:
    """The merge in a few numbers."""
    merged = sum(tensor.figures is not None for tensor in report.tensors)
    moved = report.bytes_read + report.bytes_written
    copied = len(report.tensors) - merged
    facts: list[tuple[str, str]] = [
        (f"{merged:,}", f"{'tensor' if merged == 1 else 'tensors'} merged, {copied:,} copied"),
        (duration(report.seconds), "for the streaming pass"),
        (f"{size(moved / report.seconds)}/s" if report.seconds > 0 else NO_VALUE, "read and written"),
        (size(report.bytes_read), "of tensors read"),
        (size(report.bytes_written), f"of tensors written in {count(len(report.files), 'file')}"),
    ]
    kept = report.total.kept_density
    if kept:
        low, high = percent(min(kept)), percent(max(kept))
        spread = low if low == high else f"{low.removesuffix('%')}{NO_VALUE}{high}"
        facts.append((spread, f"of each {vectors(report)} kept" if vectors(report) == "delta" else "of the values kept"))
    if len(kept) > 1:
        facts.append((percent(report.total.conflict_rate), "of entries with a sign conflict"))
    cards = element("dl", {"class": "cards"})
    for value, meaning in facts:
        cards.append(element("div", None, element("dt", None, meaning), element("dd", None, value)))
    notes = element("ul", {"class": "notes"}, *(element("li", None, note) for note in report.notes)) if report.notes else None
    return section("summary", "Summary", cards, element("h3", None, "Notes") if notes is not None else None, notes)


def _bar(share: float) -> Element:
    filled = element("rect", {"class": "filled", "width": f"{100 * share:.2f}%", "height": "100%"})
    return element("svg", {"class": "bar", "aria-hidden": "true"}, filled)


def models(report: MergeReport, labels: Sequence[str]) -> Element:
    """Every model with its kept density and norm."""
    of = vectors(report)
    rows = []
    for index, (model, label) in enumerate(zip(report.models, labels, strict=True)):
        kept = report.total.kept_density[index] if report.total.kept_density else None
        norm = report.total.norms[index] if report.total.norms else None
        name = element("th", {"scope": "row", "class": "name"}, element("bdi", None, label))
        if model != label:
            name.append(element("span", {"class": "path"}, *breakable(model)))
        density = element("td", {"class": "density"}, _bar(kept) if kept is not None else None, element("span", None, percent(kept)))
        rows.append(element("tr", None, element("td", {"class": "rank"}, str(index + 1)), name, density, *_cells(number(norm))))
    head = element("tr", None, heading("#"), heading("model", class_="name"), heading("kept"), heading("norm"))
    part = "its delta" if of == "delta" else "its values"
    caption = f"Share of {part} that selection keeps of each model, and the norm of {part}, over all merged tensors"
    base = None
    if report.base_model is not None:
        base = element("p", None, "Base: ", element("code", None, *breakable(report.base_model)), ".")
    return section("models", "Models", base, table(caption, [head], rows))


def _heat(value: float | None) -> str:
    if value is None:
        return "none"
    level = round(10 * abs(value))
    return f"{'p' if value > 0 else 'n'}{level}" if level else "zero"


def cosines(report: MergeReport, labels: Sequence[str]) -> Element | None:
    """The matrix of cosines as a coloured table; nothing for a single model."""
    matrix = report.total.cosines
    if len(matrix) < 2:
        return None
    head = element("tr", None, element("td"), heading("model", class_="name"))
    head.extend(heading(str(place + 1), title=label) for place, label in enumerate(labels))
    rows = []
    for place, (label, row) in enumerate(zip(labels, matrix, strict=True)):
        made = element("tr", None, element("td", {"class": "rank"}, str(place + 1)))
        made.append(element("th", {"scope": "row", "class": "name"}, element("bdi", None, label)))
        made.extend(
            element("td", {"class": f"heat {_heat(value)}", "title": f"{label} and {other}"}, cosine(value))
            for other, value in zip(labels, row, strict=True)
        )
        rows.append(made)
    estimated = " Those off the diagonal are estimated from evenly spaced blocks of entries." if len(matrix) > _EXACT_COSINES else ""
    meaning = f"1: the same direction; 0: nothing in common; {MINUS}1: opposite."
    return section(
        "cosines",
        "Cosines",
        _note(f"Between the models' {'deltas' if vectors(report) == 'delta' else 'values'}, over all merged tensors. {meaning}{estimated}"),
        table("Cosine of each pair of models; columns are numbered as the rows", [head], rows, class_="heat"),
    )


def _cosine_series(layers: Sequence[LayerFigures], labels: Sequence[str]) -> list[Series]:
    pairs = list(combinations(range(len(labels)), 2))
    if len(pairs) <= _MOST_PAIRS:
        names = [f"{labels[first]} and {labels[second]}" for first, second in pairs]
        return model_series(names, [[layer.cosines[first][second] for layer in layers] for first, second in pairs])
    spread = [[value for first, second in pairs if (value := layer.cosines[first][second]) is not None] for layer in layers]
    return [
        Series("largest of all pairs", [max(values, default=None) for values in spread], "s2", "6 4"),
        Series("mean of all pairs", [mean_cosine(layer.cosines) for layer in layers], "s0"),
        Series("smallest of all pairs", [min(values, default=None) for values in spread], "s4", "6 4"),
    ]


def _layer_table(layers: Sequence[LayerFigures], labels: Sequence[str]) -> Element:
    several = len(labels) > 1
    heads = ["layer", "tensors", *(f"kept: {label}" for label in labels), *(["conflicts"] if several else [])]
    heads += [*(f"norm: {label}" for label in labels), *(["mean cosine"] if several else [])]
    rows = []
    for layer in layers:
        values = [str(layer.tensors), *map(percent, layer.kept_density), *([percent(layer.conflict_rate)] if several else [])]
        values += [*map(number, layer.norms), *([cosine(mean_cosine(layer.cosines))] if several else [])]
        rows.append(element("tr", None, element("th", {"scope": "row"}, str(layer.layer)), *_cells(*values)))
    return table("Figures by layer", [element("tr", None, *(heading(text) for text in heads))], rows)


def layer_charts(report: MergeReport, labels: Sequence[str], layers: Sequence[LayerFigures]) -> Element:
    """Kept density and sign conflicts, norms, and cosines by layer."""
    if not layers:
        if not report.total.kept_density:
            return section("layers", "Layers", _note("Nothing was merged: every tensor is a copy."))
        return section("layers", "Layers", _note("No merged tensor belongs to a layer: none has a whole number between dots in its name."))
    note = _note("A layer's merged tensors taken together. Tensors outside the layers, such as embeddings, are not among them.")
    places = [layer.layer for layer in layers]
    if len(places) == 1:
        return section("layers", "Layers", note, _layer_table(layers, labels))
    across = f"layers {places[0]} to {places[-1]}"
    several = len(labels) > 1
    shares = model_series(labels, [[layer.kept_density[index] for layer in layers] for index in range(len(labels))])
    if several:
        shares.append(Series("sign conflicts", [layer.conflict_rate for layer in layers], "ink", "3 4"))
    norms = model_series(labels, [[layer.norms[index] for layer in layers] for index in range(len(labels))])
    of = vectors(report)
    charts = [
        line_chart(
            "density",
            f"Kept density{' and sign conflicts' if several else ''}",
            f"Share of entries kept, {across}, a line for each model.",
            places,
            shares,
            text=percent,
            tick=tick_percent,
            high=1.0,
        ),
        line_chart("norm", f"Norm of the {of}", f"Euclidean norms, {across}, a line for each model.", places, norms, text=number),
    ]
    if several:
        pairs = _cosine_series(layers, labels)
        charts.append(line_chart("cosine", "Cosines between models", f"Cosine of pairs of models, {across}.", places, pairs, text=cosine))
    details = element("details", None, element("summary", None, "The same as a table"), _layer_table(layers, labels))
    return section("layers", "Layers", note, *charts, details)


def recipe(report: MergeReport, text: str | None, remark: str) -> Element:
    """The recipe with its models pinned."""
    method = METHODS.get(report.method)
    about = element("p", None, "Method: ", element("code", None, report.method))
    if method is not None:
        about = element("p", None, f"{method.title} (", element("code", None, report.method), f"), source: {method.source}.")
    code = element("pre", {"tabindex": "0"}, element("code", None, text.rstrip("\n"))) if text is not None else None
    return section("recipe", "Recipe", about, _note(remark), code)


def files(report: MergeReport) -> Element:
    """Input and output files with their sizes and digests."""
    written = [
        element("tr", None, element("th", {"scope": "row", "class": "name"}, *breakable(file.name)), *_cells(size(file.bytes)))
        for file in report.files
    ]
    read = [
        element("tr", None, element("th", {"scope": "row", "class": "name"}, *breakable(item.file)), *_cells(size(item.bytes)))
        for item in report.inputs
    ]
    for row, digest in zip(
        [*written, *read], [*(f.digest for f in report.files), *(item.header_digest for item in report.inputs)], strict=True
    ):
        row.append(element("td", {"class": "digest"}, element("code", None, digest)))
    head = [heading("file", class_="name"), heading("size")]
    return section(
        "files",
        "Files",
        table("Output files", [element("tr", None, *head, heading("xxh3_128 of the file", class_="digest"))], written),
        table("Input files, as they were read", [element("tr", None, *head, heading("xxh3_128 of its header", class_="digest"))], read),
    )


def origin(report: MergeReport) -> Element:
    """What decided the output, and the software that made it."""
    facts = {
        "output": report.output,
        "seed": str(report.seed),
        "fingerprint of the recipe": report.fingerprint.recipe,
        "fingerprint of the layout": report.fingerprint.layout,
        **{f"version of {name}": version for name, version in report.versions.items()},
        "version of the report": str(report.version),
    }
    described = element("dl", {"class": "facts"})
    for name, value in facts.items():
        lines(described, [element("div", None, element("dt", None, name), element("dd", None, element("code", None, *breakable(value))))])
    return section("origin", "Origin", described)

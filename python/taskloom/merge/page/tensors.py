"""The table of tensors: complete without a script, sortable and filterable with one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from xml.etree.ElementTree import Element

from taskloom.merge.layers import mean_cosine
from taskloom.merge.page.elements import breakable, cosine, count, duration, element, heading, number, percent, size, table
from taskloom.merge.page.sections import section, vectors
from taskloom.merge.report import Figures, MergeReport, TensorReport

# With more models than this a column per model makes the table too wide to read; then it shows the range over the models.
_MOST_COLUMNS = 4

# A model with a longer name is headed by its number in the table of models.
_LONGEST_HEADING = 12


def _value(shown: str, value: float | None) -> Element:
    """A cell that is sorted by its exact value."""
    return element("td", {} if value is None else {"data-v": f"{value:.6g}"}, shown)


def _range(values: Sequence[float | None], shown: Callable[[float | None], str]) -> list[Element]:
    known = [value for value in values if value is not None]
    low, high = (min(known), max(known)) if known else (None, None)
    return [_value(shown(low), low), _value(shown(high), high)]


def _row(tensor: TensorReport, models: int) -> Element:
    shape = " \N{MULTIPLICATION SIGN} ".join(map(str, tensor.shape)) or "scalar"
    row = element("tr", None, element("th", {"scope": "row", "class": "name"}, *breakable(tensor.name)))
    row.append(_value("" if tensor.layer is None else str(tensor.layer), tensor.layer))
    row.append(_value(shape, prod(tensor.shape)))
    row.append(element("td", None, tensor.dtype))
    row.append(_value(size(tensor.bytes), tensor.bytes))
    figures = tensor.figures or Figures([], 0.0, [None] * models, [[None] * models] * models)
    kept: list[float | None] = [*figures.kept_density] if tensor.figures else [None] * models
    if models > _MOST_COLUMNS:
        row.extend([*_range(kept, percent), *_range(figures.norms, number)])
    else:
        row.extend(_value(percent(value), value) for value in kept)
        row.extend(_value(number(value), value) for value in figures.norms)
    if models > 1:
        conflicts = figures.conflict_rate if tensor.figures else None
        mean = mean_cosine(figures.cosines)
        row.extend([_value(percent(conflicts), conflicts), _value(cosine(mean), mean)])
    if tensor.figures is None:
        row.set("class", "copied")
        row.append(element("td", None, "copied"))
    else:
        row.append(_value(duration(tensor.seconds), tensor.seconds))
    return row


def _head(report: MergeReport, labels: Sequence[str]) -> list[Element]:
    of = vectors(report)
    columns = [label if len(label) <= _LONGEST_HEADING else f"#{place}" for place, label in enumerate(labels, 1)]
    if len(labels) > _MOST_COLUMNS:
        columns = ["least", "most"]
    before = [heading("tensor", class_="name"), *(heading(text) for text in ("layer", "shape", "dtype", "size"))]
    after = [heading("time")]
    if len(labels) > 1:
        after = [heading("conflicts"), heading("cosine" if len(labels) == 2 else "mean cosine", class_="wrap"), *after]
    titles = ("kept", f"norm of {of}")
    if len(columns) == 1:
        middle = [heading(title) for title in titles]
        rows = [element("tr", None, *before, *middle, *after)]
    else:
        groups = [heading(title, "colgroup", class_="group", colspan=str(len(columns))) for title in titles]
        middle = [heading(text, class_="model") for _ in titles for text in columns]
        for cell in (*before, *after):
            cell.set("rowspan", "2")
        rows = [element("tr", None, *before, *groups, *after), element("tr", None, *middle)]
    for place, cell in enumerate((*before, *middle, *after)):
        cell.set("data-column", str(place))
    for cell in (before[0], before[3]):
        cell.set("data-text", "")
    return rows


def _controls() -> Element:
    words = element("input", {"type": "search", "id": "filter", "autocomplete": "off", "spellcheck": "false", "placeholder": "q_proj BF16"})
    kinds = element("select", {"id": "kind"})
    kinds.extend(element("option", {"value": value}, text) for value, text in (("", "all"), ("merged", "merged"), ("copied", "copied")))
    return element(
        "div",
        {"class": "controls", "id": "controls", "hidden": ""},
        element("label", None, "Words in name, dtype or layer ", words),
        element("label", None, "Show ", kinds),
        element("output", {"id": "shown", "for": "filter kind"}),
    )


def tensors(report: MergeReport, labels: Sequence[str]) -> Element:
    """Every tensor of the output with its figures."""
    if not report.tensors:
        return section("tensors", "Tensors", element("p", {"class": "note"}, "The output has no tensors."))
    rows = (_row(tensor, len(labels)) for tensor in report.tensors)
    made = table(f"All {count(len(report.tensors), 'tensor')} of the output", _head(report, labels), rows, id="tensor-table")
    made.set("class", "scroll tall")
    return section("tensors", "Tensors", _controls(), made)

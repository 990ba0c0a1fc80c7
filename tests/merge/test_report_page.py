"""The page: well-formed, self-contained, and nothing that a recipe or a model brings in becomes markup."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from sample_reports import sample_report

from taskloom.merge import OutputError
from taskloom.merge.layers import by_layer, mean_cosine, model_labels
from taskloom.merge.page import render_page, write_page
from taskloom.merge.page.charts import nice_ticks, whole_ticks
from taskloom.merge.page.elements import cosine, duration, percent, size, visible
from taskloom.merge.report import Figures, MergeReport, TensorReport

VOID = {"meta", "link", "input", "wbr", "br"}
STYLE = (Path(__file__).parents[2] / "python/taskloom/merge/page/style.css").read_text(encoding="utf-8")
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "</style>&lt;b&gt;",
    '\'; drop & "quote"',
    "]]><!-- -->",
]


class Page(HTMLParser):
    """Parses a page, checking that every element is closed where it must be."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.rows: list[list[str]] = []
        self._table = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._table = dict(attrs).get("id") or ""
        if tag == "tr" and self._table == "tensor-table" and "tbody" in self.open:
            self.rows.append([])
        if tag in ("td", "th") and self.rows and self._table == "tensor-table" and "tbody" in self.open:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)
        if self.rows and self._table == "tensor-table" and "tbody" in self.open:
            self.rows[-1][-1:] = [self.rows[-1][-1] + data] if self.rows[-1] else []

    def values(self, attribute: str) -> list[str]:
        return [attributes[attribute] or "" for _, attributes in self.tags if attribute in attributes]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def text(self, tag: str) -> str:
        return " ".join(self.texts.get(tag, ()))


def _shape(report: MergeReport, **changes: object) -> MergeReport:
    return dataclasses.replace(report, **changes)


NOTHING_MERGED = _shape(
    sample_report(("org/a",), layers=0, method="passthrough"),
    total=Figures([], 0.0, [], []),
    tensors=[TensorReport("w", [], "F32", None, 4, 0.0, None)],
    base_model=None,
    notes=[],
)
NOT_FINITE = sample_report()
NOT_FINITE = _shape(
    NOT_FINITE,
    tensors=[
        *NOT_FINITE.tensors,
        TensorReport("model.layers.1.odd", [2], "F32", 1, 8, 0.0, Figures([0.5, 0.5], 0.0, [None, 0.0], [[None, None], [None, None]])),
    ],
    total=Figures([0.5, 0.5], 0.0, [None, 0.0], [[None, None], [None, None]]),
    seconds=0.0,
)
REPORTS = {
    "two": sample_report(),
    "one model": sample_report(("org/a",)),
    "nine models": sample_report(tuple(f"org/model-{number}" for number in range(9)), layers=30, modules=7),
    "no layers": sample_report(layers=0),
    "one layer": sample_report(layers=1),
    "nothing merged": NOTHING_MERGED,
    "not finite": NOT_FINITE,
    "no tensors": _shape(NOTHING_MERGED, tensors=[]),
    "twelve models": sample_report(tuple(f"org/{number}" for number in range(12))),
    "unknown method": sample_report(method="of the future"),
    "no names": _shape(sample_report(("/", ".")), output="/"),
}


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_pages_are_well_formed_and_stand_alone(report: MergeReport) -> None:
    text = render_page(report, "merge_method: ties\n")
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    page = Page(text)
    assert len(page.rows) == len(report.tensors)
    assert (page.count("h1"), page.count("title") >= 1, page.count("script"), page.count("style")) == (1, True, 1, 1)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {part for value in page.values("aria-labelledby") for part in value.split()} <= set(ids)
    assert {part for value in page.values("for") for part in value.split()} <= set(ids)
    links = page.values("href")
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert all(link.startswith(("#", "data:image/svg+xml,")) for link in links)
    assert page.values("src") == page.values("style") == page.values("action") == []
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    for tag, attributes in page.tags:
        if tag == "svg":
            assert attributes.get("aria-hidden") == "true" or attributes.get("role") == "img" or attributes.get("class") == "curves"
    assert page.count("caption") == page.count("table")
    assert "nan" not in page.text("td").lower()
    assert "None" not in text


def test_the_security_policy_allows_this_style_and_script_only() -> None:
    page = Page(render_page(sample_report()))
    (policy,) = [attributes["content"] for tag, attributes in page.tags if tag == "meta" and "http-equiv" in attributes]
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (content,) = page.texts[tag]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "url(" not in STYLE
    assert "@import" not in STYLE


@pytest.mark.parametrize("name", HOSTILE)
def test_names_cannot_become_markup(name: str) -> None:
    plain = sample_report()
    report = _shape(
        sample_report((name, "org/b"), prefix=name),
        output=f"/models/{name}",
        method=name,
        base_model=name,
        notes=[name],
        files=[dataclasses.replace(plain.files[0], name=name)],
        inputs=[dataclasses.replace(plain.inputs[0], model=name, file=name)],
        versions={name: name},
    )
    before, after = Page(render_page(plain, "x")), Page(render_page(report, name))
    for tag in ("script", "style", "img", "b"):
        assert after.count(tag) == before.count(tag)
    assert after.rows[0][0] == f"{name}embed_tokens.weight"
    assert name in after.text("li")
    assert {tag for tag, _ in after.tags} == {tag for tag, _ in before.tags}
    assert set().union(*(attributes for _, attributes in after.tags)) <= set().union(*(attributes for _, attributes in before.tags))


def test_characters_that_cannot_be_shown_are_written_out(tmp_path: Path) -> None:
    assert visible("a\x00b\u202ec\ud800\n\t") == "a\\u0000b\\u202ec\\ud800\n\t"
    write_page(sample_report(prefix="m\x00\u202e\ud800."), "a: \x1b[31m", tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.rows[0][0] == "m\\u0000\\u202e\\ud800.embed_tokens.weight"
    assert "a: \\u001b[31m" in page.text("code")


def test_rows_show_the_figures_of_their_tensors() -> None:
    report = sample_report()
    page = Page(render_page(report))
    for tensor, row in zip(report.tensors, page.rows, strict=True):
        assert row[0] == tensor.name
        assert row[1] == ("" if tensor.layer is None else str(tensor.layer))
        assert row[2] == " \N{MULTIPLICATION SIGN} ".join(map(str, tensor.shape))
        assert row[3:5] == [tensor.dtype, size(tensor.bytes)]
        figures = tensor.figures
        if figures is None:
            assert [cell.strip() for cell in row[5:]] == ["\N{EN DASH}"] * 6 + ["copied"]
            continue
        assert row[5:7] == [percent(value) for value in figures.kept_density]
        assert [float(cell) for cell in row[7:9]] == pytest.approx(figures.norms, rel=1e-3)
        assert [cell.strip() for cell in row[9:]] == [
            percent(figures.conflict_rate),
            cosine(figures.cosines[0][1]),
            duration(tensor.seconds),
        ]
    text = page.text("dd")
    assert "1.6 GB/s" in text
    assert report.fingerprint.recipe in page.text("code")


def test_many_models_are_shown_by_their_range() -> None:
    report = REPORTS["nine models"]
    row = Page(render_page(report)).rows[0]
    figures = report.tensors[0].figures
    assert figures is not None
    assert row[5:7] == [percent(min(figures.kept_density)), percent(max(figures.kept_density))]
    assert row[10] == cosine(mean_cosine(figures.cosines))


def test_missing_figures_are_dashes() -> None:
    row = Page(render_page(NOT_FINITE)).rows[-1]
    assert row[7:11] == ["\N{EN DASH}", "0", "0%", "\N{EN DASH}"]


def test_what_belongs_to_one_model_only_is_left_out() -> None:
    one, two = Page(render_page(REPORTS["one model"])), Page(render_page(REPORTS["two"]))
    assert "#cosines" not in one.values("href")
    assert "#cosines" in two.values("href")
    assert "sign conflicts" not in one.text("bdi")
    assert "sign conflicts" in two.text("bdi")
    assert len(one.rows[0]) == len(two.rows[0]) - 4


def test_without_layers_the_page_says_so() -> None:
    assert "Nothing was merged" in render_page(NOTHING_MERGED)
    assert "No merged tensor belongs to a layer" in render_page(REPORTS["no layers"])
    assert 'class="chart"' not in render_page(REPORTS["one layer"])
    assert Page(render_page(REPORTS["two"])).count("figure") == 3


def test_methods_without_deltas_speak_of_values() -> None:
    linear, ties = (render_page(sample_report(method=method)) for method in ("linear", "ties"))
    assert "norm of values" in linear
    assert "norm of delta" in ties


def test_the_recipe_and_whether_it_is_still_the_same() -> None:
    recipe = "merge_method: ties\n"
    report = sample_report()
    report = _shape(report, fingerprint=dataclasses.replace(report.fingerprint, recipe=xxhash.xxh3_128(recipe.encode()).hexdigest()))
    assert "it gives the same bytes again" in render_page(report, recipe)
    assert "it was changed after the merge" in render_page(report, recipe + "seed: 3\n")
    assert "is not in the folder of the report" in render_page(report, None)
    assert "<code>merge_method: ties</code>" in render_page(report, recipe)


def test_the_same_report_gives_the_same_bytes() -> None:
    report = sample_report()
    assert render_page(report, "x") == render_page(MergeReport.from_dict(report.to_dict()), "x")


def test_thousands_of_tensors_stay_small() -> None:
    report = sample_report(tuple(f"org/{number}" for number in range(3)), layers=40, modules=25)
    assert len(report.tensors) == 1002
    assert len(render_page(report).encode()) < 1_000_000


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    write_page(sample_report(), None, path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OutputError, match=r"page .*page\.html: cannot be written: No space left on device"):
        write_page(sample_report(("a",)), None, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(OutputError, match="No such file or directory"):
        write_page(sample_report(), None, tmp_path / "nowhere" / "page.html")


def test_layers_are_their_tensors_taken_together() -> None:
    random = np.random.default_rng(3)
    deltas = [random.normal(size=(2, entries)) for entries in (40, 7)]
    tensors = []
    for number, (first, second) in enumerate(deltas):
        norms: list[float | None] = [float(np.linalg.norm(first)), float(np.linalg.norm(second))]
        close = float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))
        figures = Figures([0.5 + number / 10, 0.25], 0.1 + number / 10, norms, [[1.0, close], [close, 1.0]])
        tensors.append(TensorReport(f"layers.4.{number}", [first.size], "F32", 4, 4 * first.size, 0.0, figures))
    (layer,) = by_layer(_shape(sample_report(), tensors=tensors))
    first, second = (np.concatenate([delta[model] for delta in deltas]) for model in range(2))
    assert (layer.layer, layer.tensors) == (4, 2)
    np.testing.assert_allclose(layer.norms, [np.linalg.norm(first), np.linalg.norm(second)])
    expected = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    np.testing.assert_allclose(np.array(layer.cosines, float), [[1, expected], [expected, 1]])
    np.testing.assert_allclose(layer.kept_density, [(40 * 0.5 + 7 * 0.6) / 47, 0.25])
    assert layer.conflict_rate == pytest.approx((40 * 0.1 + 7 * 0.2) / 47)
    odd = next(layer for layer in by_layer(NOT_FINITE) if layer.layer == 1)
    assert odd.norms[0] is None
    assert odd.cosines[0][1] is None
    assert odd.norms[1] is not None


@pytest.mark.parametrize(
    ("models", "labels"),
    [
        (("org/math", "org/code"), ["math", "code"]),
        (("a/final", "b/final"), ["a", "b"]),
        (("/data/run-1/x/last", "/data/run-2/y/last"), ["run-1/x", "run-2/y"]),
        (("math",), ["math"]),
        (("/", "."), ["/", "."]),
        (("m" * 40 + "1", "m" * 40 + "2"), ["…" + "m" * 30 + "1", "…" + "m" * 30 + "2"]),
        (("1" + "m" * 40, "2" + "m" * 40), ["…" + "m" * 31 + " (1)", "…" + "m" * 31 + " (2)"]),
    ],
)
def test_models_have_short_names_that_differ(models: tuple[str, ...], labels: list[str]) -> None:
    assert model_labels(models) == labels


@given(st.floats(-1e30, 0), st.floats(0, 1e30))
def test_ticks_are_few_and_span_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))
    slack = 1e-6 * (ticks[-1] - ticks[0])
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack


@given(st.lists(st.integers(0, 500), min_size=1, max_size=60, unique=True))
def test_layer_numbers_are_few(places: list[int]) -> None:
    places.sort()
    ticks = whole_ticks(places)
    assert 1 <= len(ticks) <= 9
    assert all(places[0] <= tick <= places[-1] for tick in ticks)


def test_numbers_are_written_for_people() -> None:
    assert [percent(value) for value in (0.0, 1.0, 0.5, 0.05, 0.00012, None)] == ["0%", "100%", "50.0%", "5.00%", "0.012%", "\N{EN DASH}"]
    assert [size(value) for value in (0, 999, 1000, 999_960, 2.5e9, 3e15)] == ["0 B", "999 B", "1.0 kB", "1.0 MB", "2.5 GB", "3000.0 TB"]
    assert [duration(value) for value in (0.0, 0.0123, 1.5, 99.9, 125, 7300)] == [
        "0 ms",
        "12.3 ms",
        "1.5 s",
        "99.9 s",
        "2 min 5 s",
        "2 h 1 min",
    ]
    assert [cosine(value) for value in (1.0, -0.001, -0.5)] == ["1.00", "0.00", "\N{MINUS SIGN}0.50"]


def _luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(first: str, second: str) -> float:
    bright, dark = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_colours_stand_out_in_light_and_dark() -> None:
    themes = [dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{6});", block)) for block in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)]
    assert len(themes) == 3
    for theme in themes[:2]:
        for ground in (theme["panel"], theme["soft"], theme["ground"]):
            assert min(_contrast(theme[ink], ground) for ink in ("ink", "muted")) >= 4.5
        assert _contrast(theme["accent"], theme["panel"]) >= 4.5
        assert min(_contrast(theme[f"s{number}"], theme["panel"]) for number in range(10)) >= 3
        # Text on the two ends of the heat map; what lies between them and the panel has more contrast than one of the two.
        assert min(_contrast(theme["ink"], theme[end]) for end in ("positive", "negative")) >= 4.5
    assert math.isclose(_contrast("#000000", "#ffffff"), 21)

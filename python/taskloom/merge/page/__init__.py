"""The report of a merge as one HTML file that needs nothing else: no network, no script of others, no font.

It is a function of ``merge_report.json`` and the recipe beside it, so that it can be made again from them at any time and is the same
every time. Histograms of magnitudes are not in the report (they take another pass over the models; ``--plot`` draws them) and so not here.
"""

from __future__ import annotations

import base64
import hashlib
import os
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path
from xml.etree.ElementTree import Element

from taskloom.merge.errors import OutputError, ReportError
from taskloom.merge.layers import by_layer, model_labels
from taskloom.merge.output import RECIPE
from taskloom.merge.page import sections
from taskloom.merge.page.elements import count, element, serialise
from taskloom.merge.page.tensors import tensors
from taskloom.merge.report import MergeReport

PAGE = "merge_report.html"

_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Cpath d='M2 3c6 0 4 10 12 10M2 13C8 13 6 3 14 3' "
    "fill='none' stroke='%231f6fb2' stroke-width='2.4' stroke-linecap='round'/%3E%3C/svg%3E"
)


@cache
def _resource(name: str) -> str:
    return files("taskloom.merge.page").joinpath(name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


def _head(title: str) -> Element:
    style, script = _resource("style.css"), _resource("script.js")
    allowed = f"style-src {_source(style)}; script-src {_source(script)}; img-src data:"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    return element(
        "head",
        None,
        element("meta", {"charset": "utf-8"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": policy}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"name": "color-scheme", "content": "light dark"}),
        element("title", None, title),
        element("link", {"rel": "icon", "href": _ICON}),
        element("style", None, style),
    )


def _remark(report: MergeReport, recipe: str | None) -> str:
    if recipe is None:
        return f"{RECIPE} is not in the folder of the report."
    import xxhash

    if xxhash.xxh3_128(recipe.encode()).hexdigest() != report.fingerprint.recipe:
        return f"{RECIPE} as it is now; it was changed after the merge."
    return f"{RECIPE}: models pinned and the seed written down, so that it gives the same bytes again."


def render_page(report: MergeReport, recipe: str | None = None) -> str:
    """The page as HTML.

    Parameters
    ----------
    report
        What to show.
    recipe
        Text of the recipe with pinned models (``taskloom_recipe.yml``); None where it is not at hand.
    """
    labels = model_labels(report.models)
    name = Path(report.output).name or report.output
    parts = [
        sections.summary(report),
        sections.models(report, labels),
        sections.cosines(report, labels),
        sections.layer_charts(report, labels, by_layer(report)),
        tensors(report, labels),
        sections.recipe(report, recipe, _remark(report, recipe)),
        sections.files(report),
        sections.origin(report),
    ]
    shown = [part for part in parts if part is not None]
    links = element("nav", {"aria-label": "Sections"})
    for part in shown:
        links.append(element("a", {"href": f"#{part.get('id')}"}, part[0].text))
    lead = element("p", {"class": "lead"}, f"{count(len(labels), 'model')} merged by ", element("b", None, report.method))
    header = element("header", None, element("p", {"class": "kind"}, "Merge report"), element("h1", None, name), lead, links)
    body = element("body", None, element("main", None, header, *shown), element("script", None, _resource("script.js")))
    return serialise(element("html", {"lang": "en"}, _head(f"{name}: merge report"), body))


def write_page(report: MergeReport, recipe: str | None, path: Path) -> None:
    """Write the page; a file that was there is replaced at once, or stays whole.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(render_page(report, recipe), encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OutputError(f"page {path}: cannot be written: {error.strerror}") from error


def recipe_beside(folder: Path) -> str | None:
    """The recipe that a merge wrote into its folder; None where there is none.

    Raises
    ------
    ReportError
        If it cannot be read.
    """
    path = folder / RECIPE
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ReportError(f"recipe {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ReportError(f"recipe {path}: is not UTF-8 text") from error

"""Elements of the page, and how it writes numbers.

The page is a tree of :mod:`xml.etree.ElementTree` elements, serialised at the end: every name that comes from a recipe or a model is
escaped there, so no text can become markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from xml.etree.ElementTree import Element, tostring

Child = Element | str | None

# Control characters, lone surrogates, and characters that turn the direction of text around.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")

MINUS = "\N{MINUS SIGN}"
NO_VALUE = "\N{EN DASH}"


def visible(text: str) -> str:
    """Text with every character that a page cannot show, or that would hide what is there, as its escape."""
    if _UNPRINTABLE.search(text) is None:
        return text
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _add(parent: Element, child: Child) -> None:
    if child is None:
        return
    if isinstance(child, Element):
        parent.append(child)
    elif len(parent):
        parent[-1].tail = (parent[-1].tail or "") + visible(child)
    else:
        parent.text = (parent.text or "") + visible(child)


def element(tag: str, attributes: Mapping[str, str] | None = None, *children: Child) -> Element:
    """An element of HTML or SVG with its children; None stands for no child."""
    made = Element(tag, {name: visible(value) for name, value in (attributes or {}).items()})
    for child in children:
        _add(made, child)
    return made


def lines(parent: Element, children: Iterable[Element]) -> Element:
    """Add children, each on a line of its own in the file."""
    for child in children:
        child.tail = "\n"
        parent.append(child)
    return parent


def serialise(root: Element) -> str:
    """The whole document as HTML."""
    text: str = tostring(root, encoding="unicode", method="html")
    return f"<!DOCTYPE html>\n{text}\n"


def breakable(name: str) -> list[Child]:
    """A dotted name that may be broken after its dots and slashes."""
    parts: list[Child] = []
    for part in re.split(r"(?<=[./])(?=.)", name):
        if parts:
            parts.append(Element("wbr"))
        parts.append(part)
    return parts


def percent(share: float | None) -> str:
    """A share as a percentage, exact at its ends and never rounded to zero."""
    if share is None:
        return NO_VALUE
    if share in (0, 1):
        return f"{share:.0%}"
    if share >= 0.1:
        return f"{share:.1%}"
    return f"{share:.2%}" if share >= 0.001 else f"{100 * share:.2g}%"


def tick_percent(share: float) -> str:
    """A share as a whole percentage, beside an axis."""
    return f"{share:.0%}"


def number(value: float | None) -> str:
    """A figure with four significant digits."""
    return NO_VALUE if value is None else f"{value:.4g}"


def cosine(value: float | None) -> str:
    """A cosine with two decimals."""
    return NO_VALUE if value is None else f"{value:.2f}".replace("-0.00", "0.00").replace("-", MINUS)


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.95:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def count(value: int, noun: str) -> str:
    """A number of things: ``1 tensor``, ``1,200 tensors``."""
    return f"{value:,} {noun}{'' if value == 1 else 's'}"


def _named(attributes: Mapping[str, str]) -> dict[str, str]:
    # ``class`` is a keyword of Python.
    return {name.rstrip("_"): value for name, value in attributes.items()}


def table(caption: str, head: Iterable[Element], rows: Iterable[Element], **attributes: str) -> Element:
    """A table in a box that scrolls by itself where it is wider than the page; the box takes the keyboard's focus for that."""
    made = element("table", _named(attributes), element("caption", None, element("span", None, caption)))
    made.append(lines(element("thead"), head))
    made.append(lines(element("tbody"), rows))
    return element("div", {"class": "scroll", "role": "region", "aria-label": caption, "tabindex": "0"}, made)


def heading(text: str, scope: str = "col", **attributes: str) -> Element:
    """A header cell."""
    return element("th", {"scope": scope} | _named(attributes), text)

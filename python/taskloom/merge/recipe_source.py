"""Reads what a recipe is written in, YAML or a Python mapping, into plain values; hostile and ambiguous spellings are refused here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from taskloom.merge.errors import RecipeError, shown

MOST_BYTES = 10_000_000
# Values, keys and collections together, with every alias counted as all that it stands for.
MOST_NODES = 500_000
MOST_DEPTH = 64
# So many characters of a text count as one more value: a long one may be aliased often too.
_CHARACTERS = 100
_PIECE = 2**16
# Whole numbers above this are no float.
_MOST_BITS = 1023
_MOST_DIGITS = 400

_TEXT_TAG = "tag:yaml.org,2002:str"
_UNREAD_TAGS = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value")
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_WHOLE = re.compile(r"[-+]?[0-9][0-9_]*")


# PyYAML's safe loader, in C where it is built with libyaml, to which dates and ``=`` are text: a recipe has no use for them, and a folder
# may be called 2024-01-01.
_Loader: Any = type(
    "_Loader",
    (getattr(yaml, "CSafeLoader", yaml.SafeLoader),),
    {
        "yaml_implicit_resolvers": {
            first: [(tag, pattern) for tag, pattern in resolvers if tag not in _UNREAD_TAGS]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }
    },
)


@dataclass
class _Collection:
    """A list or mapping whose end the scan has not seen yet; ``nodes`` counts what is in it, aliases expanded."""

    anchor: str | None
    is_mapping: bool
    nodes: int = 1
    children: int = 0
    keys: set[str] = field(default_factory=set)


class _Scan:
    """One pass over YAML's events, which costs no more than the text is long, before anything is built from them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.open: list[_Collection] = []
        self.sizes: dict[str, int] = {}

    def fail(self, event: yaml.Event, problem: str) -> RecipeError:
        mark = event.start_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        return RecipeError(f"{self.name}: {where}{problem}")

    def _count(self, event: yaml.Event, nodes: int) -> None:
        if self.open:
            parent = self.open[-1]
            parent.nodes += nodes
            parent.children += 1
            if parent.nodes > MOST_NODES:
                raise self.fail(event, f"holds more than {MOST_NODES} values once its aliases are written out")

    def _check_key(self, event: yaml.Event) -> None:
        parent = self.open[-1] if self.open else None
        if parent is None or not parent.is_mapping or parent.children % 2 == 1:
            return
        if not isinstance(event, yaml.ScalarEvent):
            raise self.fail(event, "a key must be text, not a list, a mapping or an alias")
        if event.value in parent.keys:
            raise self.fail(event, f"key {shown(event.value)} is given twice")
        parent.keys.add(event.value)

    def _check_scalar(self, event: yaml.ScalarEvent) -> None:
        if event.style or event.tag is not None:
            return
        text = event.value
        if _OCTAL.fullmatch(text):
            raise self.fail(event, f"{text[:40]} is octal in YAML 1.1 and decimal in 1.2; write it without the leading zero, or in quotes")
        if _SEXAGESIMAL.fullmatch(text):
            raise self.fail(event, f"{text[:40]} is a number to base 60 in YAML 1.1; write it in decimal, or in quotes")
        if len(text) > _MOST_DIGITS and _WHOLE.fullmatch(text):
            raise self.fail(event, f"a whole number of more than {_MOST_DIGITS} digits")

    def add(self, event: yaml.Event) -> None:
        """Take the next event; raises RecipeError where it breaks a rule."""
        if isinstance(event, yaml.NodeEvent):
            self._check_key(event)
            tag = getattr(event, "tag", None)
            if tag is not None and tag != _TEXT_TAG:
                raise self.fail(event, f"tag {shown(tag)} is not supported; write the value without it")
        if isinstance(event, yaml.ScalarEvent):
            self._check_scalar(event)
            size = 1 + len(event.value) // _CHARACTERS
            self._count(event, size)
            if event.anchor is not None:
                self.sizes[event.anchor] = size
        elif isinstance(event, yaml.AliasEvent):
            if any(collection.anchor == event.anchor for collection in self.open):
                raise self.fail(event, f"alias {shown(event.anchor)} stands inside what it stands for")
            # An alias of no anchor is left to the loader, which says so.
            self._count(event, self.sizes.get(event.anchor or "", 1))
        elif isinstance(event, yaml.CollectionStartEvent):
            if len(self.open) >= MOST_DEPTH:
                raise self.fail(event, f"is nested more than {MOST_DEPTH} deep")
            self.open.append(_Collection(event.anchor, isinstance(event, yaml.MappingStartEvent)))
        elif isinstance(event, yaml.CollectionEndEvent):
            done = self.open.pop()
            if done.anchor is not None:
                self.sizes[done.anchor] = done.nodes
            self._count(event, done.nodes)


def place(path: tuple[str | int, ...]) -> str:
    """A place in a recipe as its messages write it: ``models[2].parameters.weight``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


class _Plain:
    """Rebuilds a tree from plain values: dicts, lists, text, numbers, booleans and None."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes = 0

    def _fail(self, path: tuple[str | int, ...], problem: str) -> RecipeError:
        where = f" {place(path)}:" if path else ""
        return RecipeError(f"{self.name}:{where} {problem}")

    def _count(self, nodes: int, path: tuple[str | int, ...]) -> None:
        self.nodes += nodes
        if self.nodes > MOST_NODES:
            raise self._fail(path[:1], f"holds more than {MOST_NODES} values")

    def scalar(self, value: Any, path: tuple[str | int, ...]) -> Any:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            # A sub-class, such as an enum of text, is written down as the text that it is.
            text = str.__str__(value)
            self._count(len(text) // _CHARACTERS, path)
            if not text.isprintable() and any(0xD800 <= ord(character) < 0xE000 for character in text):
                raise self._fail(path, f"text that is not valid Unicode: {shown(text)}")
            return text
        if isinstance(value, int):
            if value.bit_length() > _MOST_BITS:
                raise self._fail(path, f"a whole number of {value.bit_length()} bits")
            return int(value)
        if isinstance(value, float):
            return float(value)
        if isinstance(value, Path):
            return self.scalar(str(value), path)
        raise self._fail(path, f"expected text, a number, true, false or null, got {shown(value)} of type {type(value).__name__}")

    def tree(self, value: Any, path: tuple[str | int, ...] = ()) -> Any:
        self._count(1, path)
        if len(path) > MOST_DEPTH:
            raise self._fail(path[:3], f"is nested more than {MOST_DEPTH} deep, or holds itself")
        if isinstance(value, Mapping):
            found = {}
            for key, item in value.items():
                name = self.scalar(key, path)
                found[name] = self.tree(item, (*path, shown(name) if not isinstance(name, str) else name[:80]))
            return found
        if isinstance(value, list | tuple):
            return [self.tree(item, (*path, number)) for number, item in enumerate(value)]
        if hasattr(value, "tolist"):
            if getattr(value, "nbytes", 0) > MOST_NODES:
                raise self._fail(path, f"an array of {value.nbytes} bytes")
            return self.tree(value.tolist(), path)
        return self.scalar(value, path)


def plain_values(value: Any, name: str = "recipe") -> Any:
    """Python-only spellings (tuples, paths, numbers and arrays of numpy or torch) as YAML would have them, in a tree without sharing.

    Raises
    ------
    RecipeError
        If it holds something else, holds itself, is nested more than 64 deep or has more than 500,000 values; names the place.
    """
    return _Plain(name).tree(value)


def parse_recipe_text(text: str, name: str) -> Any:
    """Parse YAML into plain values.

    Parameters
    ----------
    text
        YAML. Aliases and merge keys are followed, up to 500,000 values in all; tags other than ``!!str`` are refused.
    name
        Names the text in messages.

    Raises
    ------
    RecipeError
        If it is not YAML, or breaks one of the rules above.
    """
    scan = _Scan(name)
    try:
        for event in yaml.parse(text, Loader=_Loader):
            scan.add(event)
        loaded = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: is not valid YAML: {error}") from error
    except RecursionError as error:
        raise RecipeError(f"{name}: is nested too deeply") from error
    return plain_values(loaded, name)


def recipe_yaml(document: Any) -> str:
    """Plain values as YAML."""
    text: str = yaml.dump(document, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), sort_keys=False, allow_unicode=True)
    return text


def read_recipe_text(path: Path) -> str:
    """The text of a recipe file of at most 10 MB; a pipe will do, as of ``<(command)``.

    Raises
    ------
    RecipeError
        If it cannot be read, is too large or not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            content = b""
            while len(content) <= MOST_BYTES and (piece := file.read(_PIECE)):
                content += piece
    except (OSError, ValueError) as error:
        raise RecipeError(f"recipe {path}: cannot be read: {getattr(error, 'strerror', error)}") from error
    if len(content) > MOST_BYTES:
        raise RecipeError(f"recipe {path}: is above the limit of {MOST_BYTES} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path}: is not UTF-8 text") from error

"""Reads ``merge_report.json`` back, and refuses whatever is not exactly such a report."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

from pydantic_core import SchemaValidator, ValidationError, from_json

from taskloom.merge.errors import ReportError
from taskloom.merge.output import REPORT
from taskloom.merge.report import VERSION, Figures, MergeReport

_SCALARS: dict[Any, dict[str, Any]] = {
    bool: {"type": "bool", "strict": True},
    str: {"type": "str", "strict": True},
    int: {"type": "int", "strict": True},
    float: {"type": "float", "strict": True, "allow_inf_nan": False},
}


def _schema(kind: Any) -> dict[str, Any]:
    """The pydantic_core schema of a type that a report is made of: the dataclasses are the only place where its fields are listed."""
    if kind in _SCALARS:
        return _SCALARS[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return {"type": "list", "items_schema": _schema(arguments[0])}
    if origin is dict:
        return {"type": "dict", "keys_schema": _schema(arguments[0]), "values_schema": _schema(arguments[1])}
    if origin is UnionType and NoneType in arguments:
        (inner,) = (argument for argument in arguments if argument is not NoneType)
        return {"type": "nullable", "schema": _schema(inner)}
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise TypeError(f"a report has no place for a {kind}")
    hints = typing.get_type_hints(kind)
    names = [field.name for field in fields(kind)]
    described = [{"type": "dataclass-field", "name": name, "schema": _schema(hints[name])} for name in names]
    arguments_schema = {"type": "dataclass-args", "dataclass_name": kind.__name__, "fields": described, "extra_behavior": "forbid"}
    return {"type": "dataclass", "cls": kind, "fields": names, "schema": arguments_schema}


@cache
def _validator() -> SchemaValidator:
    return SchemaValidator(_schema(MergeReport))


def _place(parts: Sequence[int | str]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


def _refusal(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = _place(first["loc"])
    if first["type"] == "missing":
        return f"field {place!r} is missing"
    if first["type"] == "unexpected_keyword_argument":
        return f"unknown field {place!r}"
    if first["type"] == "dataclass_type":
        return f"{place}: expected an object, got {_shortened(first['input'])}"
    return f"{place}: {first['msg'][:1].lower()}{first['msg'][1:]}, got {_shortened(first['input'])}"


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _wrong_figures(figures: Figures, models: int) -> Iterator[str]:
    for name, values in (("kept_density", figures.kept_density), ("norms", figures.norms), ("cosines", figures.cosines)):
        if len(values) != models:
            yield f".{name}: expected one entry for each of {models} models, got {len(values)}"
    for number, row in enumerate(figures.cosines):
        if len(row) != models:
            yield f".cosines[{number}]: expected one entry for each of {models} models, got {len(row)}"
    for number, value in enumerate(figures.kept_density):
        if not 0 <= value <= 1:
            yield f".kept_density[{number}]: expected a share from 0 to 1, got {value}"
    if not 0 <= figures.conflict_rate <= 1:
        yield f".conflict_rate: expected a share from 0 to 1, got {figures.conflict_rate}"


def _contradictions(report: MergeReport) -> Iterator[str]:
    """What the types cannot say: lists that must be as long as the list of models, and counts below zero."""
    models = len(report.models)
    counts = {"seconds": report.seconds, "bytes_read": report.bytes_read, "bytes_written": report.bytes_written}
    for name, value in counts.items():
        if value < 0:
            yield f"{name}: expected 0 or more, got {value}"
    merged = False
    for number, tensor in enumerate(report.tensors):
        if any(size < 0 for size in tensor.shape):
            yield f"tensors[{number}].shape: expected sizes of 0 or more, got {tensor.shape}"
        if tensor.figures is not None:
            merged = True
            yield from (f"tensors[{number}].figures{wrong}" for wrong in _wrong_figures(tensor.figures, models))
    yield from (f"total{wrong}" for wrong in _wrong_figures(report.total, models if merged else 0))


def parse_report(plain: Any) -> MergeReport:
    """A report from the plain types that its JSON consists of.

    Raises
    ------
    ValueError
        If the version is another one, a field is missing, unknown or of the wrong type, a figure is not finite, or the figures do not
        fit the list of models. The message names the field.
    """
    if not isinstance(plain, Mapping):
        raise ValueError(f"expected an object with the fields of a report, got {_shortened(plain)}")
    if "version" not in plain:
        raise ValueError("field 'version' is missing; this is no merge report, or one of a version before 1")
    if type(plain["version"]) is not int or plain["version"] != VERSION:
        raise ValueError(f"version {_shortened(plain['version'])} is unknown; this taskloom reads version {VERSION}")
    try:
        report: MergeReport = _validator().validate_python(dict(plain))
    except ValidationError as error:
        raise ValueError(_refusal(error)) from None
    for wrong in _contradictions(report):
        raise ValueError(wrong)
    return report


def load_report(path: str | Path) -> MergeReport:
    """Read the report of a merge.

    Parameters
    ----------
    path
        A ``merge_report.json``, or the folder that holds one.

    Raises
    ------
    ReportError
        If it cannot be read, is no JSON, or is no report of a version that is known here. The message names the file and the field.
    """
    path = Path(path)
    if path.is_dir():
        path = path / REPORT
    try:
        plain = from_json(path.read_bytes(), allow_inf_nan=False)
    except FileNotFoundError as error:
        raise ReportError(f"report {path}: no such file; expected the folder of a merge or its {REPORT}") from error
    except OSError as error:
        raise ReportError(f"report {path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ReportError(f"report {path}: is not valid JSON: {error}") from error
    try:
        return parse_report(plain)
    except ValueError as error:
        raise ReportError(f"report {path}: {error}") from error

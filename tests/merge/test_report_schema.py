"""docs/schemas/merge_report.schema.json says exactly what merges write, and load_report accepts exactly that."""

from __future__ import annotations

import copy
import dataclasses
import json
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from safetensors.numpy import save_file
from sample_reports import sample_report
from toy_checkpoints import recipe_of, toy_tensors

from taskloom.merge import MergeReport, ReportError, load_report, merge_checkpoints
from taskloom.merge.report import Figures, FileReport, FingerprintReport, InputReport, TensorReport
from taskloom.merge.stages import METHODS

DOCS = Path(__file__).parents[2] / "docs"
SCHEMA = json.loads((DOCS / "schemas" / "merge_report.schema.json").read_text(encoding="utf-8"))
CHECK = jsonschema.Draft202012Validator(SCHEMA)
KINDS = {
    "figures": Figures,
    "tensor": TensorReport,
    "file": FileReport,
    "input": InputReport,
    "fingerprint": FingerprintReport,
}


def _recipe(models: dict[str, Path], method: str) -> dict[str, Any]:
    if method == "passthrough":
        return {"merge_method": method, "models": [{"model": str(models["a"])}], "parameters": {"scale": 0.5}}
    if method == "slerp":
        one = [{"model": str(models["a"])}]
        return {"merge_method": method, "base_model": str(models["base"]), "models": one, "parameters": {"t": 0.5}}
    density = {"density": 0.5} if METHODS[method].parameter("density") else {}
    based = {} if METHODS[method].base == "required" else {"base_model": None}
    return recipe_of(models, method, parameters=density, **based)


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"


@pytest.mark.parametrize(("name", "kind"), [(None, MergeReport), *KINDS.items()])
def test_schema_and_dataclasses_have_the_same_fields(name: str | None, kind: type) -> None:
    described = SCHEMA if name is None else SCHEMA["$defs"][name]
    names = [field.name for field in dataclasses.fields(kind)]
    assert list(described["properties"]) == names
    assert described["required"] == names
    assert described["additionalProperties"] is False


def test_every_dataclass_of_the_report_is_in_the_schema() -> None:
    found: set[type] = set()

    def visit(kind: Any) -> None:
        for argument in typing.get_args(kind):
            visit(argument)
        if dataclasses.is_dataclass(kind) and kind not in found:
            found.add(typing.cast(type, kind))
            for hint in typing.get_type_hints(kind).values():
                visit(hint)

    visit(MergeReport)
    assert found == {MergeReport, *KINDS.values()}


@pytest.mark.parametrize("method", METHODS)
def test_reports_of_every_method_fit(models: dict[str, Path], tmp_path: Path, method: str) -> None:
    report = merge_checkpoints(_recipe(models, method), tmp_path / "out", seed=3)
    CHECK.validate(json.loads((tmp_path / "out" / "merge_report.json").read_text()))
    assert load_report(tmp_path / "out") == report
    assert MergeReport.from_dict(report.to_dict()) == report


def test_reports_with_copies_shards_and_figures_that_are_not_finite_fit(models: dict[str, Path], tmp_path: Path) -> None:
    tensors = toy_tensors(1)
    tensors["model.norm.weight"][0] = np.inf
    save_file(tensors, models["a"] / "model.safetensors")
    merge_checkpoints(recipe_of(models), tmp_path / "out", allow_nonfinite=True, shard_size=1000)
    plain = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert len(plain["files"]) > 1
    assert plain["total"]["norms"][0] is None
    CHECK.validate(plain)
    copied = merge_checkpoints({"merge_method": "passthrough", "models": [{"model": str(models["b"])}]}, tmp_path / "copy")
    CHECK.validate(json.loads((tmp_path / "copy" / "merge_report.json").read_text()))
    assert load_report(tmp_path / "copy" / "merge_report.json") == copied


def test_samples_fit() -> None:
    for models in (("m",), ("org/a", "org/b"), tuple(f"org/{number}" for number in range(9))):
        CHECK.validate(sample_report(models).to_dict())


def _set(*path: int | str, to: Any) -> Callable[[Any], None]:
    def change(plain: Any) -> None:
        for part in path[:-1]:
            plain = plain[part]
        plain[path[-1]] = to

    return change


def _drop(*path: int | str) -> Callable[[Any], None]:
    def change(plain: Any) -> None:
        for part in path[:-1]:
            plain = plain[part]
        del plain[path[-1]]

    return change


# What both the schema and load_report refuse.
SPOILED: list[tuple[Callable[[Any], None], str]] = [
    (_drop("version"), "field 'version' is missing"),
    (_set("version", to=2), "version 2 is unknown; this taskloom reads version 1"),
    (_set("version", to="1"), "version '1' is unknown"),
    (_set("version", to=True), "version True is unknown"),
    (_drop("seed"), "field 'seed' is missing"),
    (_drop("tensors", 2, "shape"), "field 'tensors[2].shape' is missing"),
    (_set("comment", to="x"), "unknown field 'comment'"),
    (_set("tensors", 2, "colour", to=1), "unknown field 'tensors[2].colour'"),
    (_set("total", "median", to=1), "unknown field 'total.median'"),
    (_set("seed", to="7"), "seed: input should be a valid integer, got '7'"),
    (_set("seconds", to="2"), "seconds: input should be a valid number, got '2'"),
    (_set("models", 0, to=None), "models[0]: input should be a valid string, got None"),
    (_set("models", to="org/math"), "models: input should be a valid list, got 'org/math'"),
    (_set("fingerprint", to=3), "fingerprint: expected an object, got 3"),
    (_set("tensors", 2, "figures", to=[]), "tensors[2].figures: expected an object, got []"),
    (_set("tensors", 2, "figures", "norms", 0, to="nan"), "tensors[2].figures.norms[0]: input should be a valid number, got 'nan'"),
    (_set("tensors", 2, "figures", "kept_density", 0, to=None), "tensors[2].figures.kept_density[0]: input should be a valid number"),
    (_set("tensors", 2, "shape", 0, to=-1), "tensors[2].shape: expected sizes of 0 or more, got [-1, 64]"),
    (_set("total", "conflict_rate", to=1.5), "total.conflict_rate: expected a share from 0 to 1, got 1.5"),
    (_set("total", "kept_density", 1, to=-0.5), "total.kept_density[1]: expected a share from 0 to 1, got -0.5"),
    (_set("bytes_read", to=-1), "bytes_read: expected 0 or more, got -1"),
    (_set("versions", "python", to=3), "versions.python: input should be a valid string, got 3"),
]


@pytest.mark.parametrize(("change", "message"), SPOILED, ids=[message for _, message in SPOILED])
def test_spoiled_reports_are_refused_by_schema_and_reader(tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    plain = copy.deepcopy(sample_report().to_dict())
    change(plain)
    assert not CHECK.is_valid(plain)
    path = tmp_path / "merge_report.json"
    path.write_text(json.dumps(plain))
    with pytest.raises(ReportError) as caught:
        load_report(tmp_path)
    assert str(caught.value).startswith(f"report {path}: {message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("total", "norms", to=[1.0]), "total.norms: expected one entry for each of 2 models, got 1"),
        (_set("total", "cosines", 1, to=[1.0]), "total.cosines[1]: expected one entry for each of 2 models, got 1"),
        (_set("models", to=["a", "b", "c"]), "tensors[0].figures.kept_density: expected one entry for each of 3 models, got 2"),
    ],
)
def test_figures_must_fit_the_models(tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    plain = sample_report().to_dict()
    change(plain)
    (tmp_path / "merge_report.json").write_text(json.dumps(plain))
    with pytest.raises(ReportError) as caught:
        load_report(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"),
        (b'{"version": 1', "is not valid JSON"),
        (b'{"version": NaN}', "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[1]", "expected an object with the fields of a report, got [1]"),
        (b'{"loss": 3}', "field 'version' is missing; this is no merge report"),
        (b'{"version": 1}', "field 'output' is missing"),
    ],
)
def test_files_that_are_no_reports(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "anything.json"
    path.write_bytes(content)
    with pytest.raises(ReportError) as caught:
        load_report(path)
    assert str(caught.value).startswith(f"report {path}: {message}")


def test_a_report_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ReportError, match=r"no such file; expected the folder of a merge or its merge_report\.json"):
            load_report(path)


def test_whole_numbers_are_figures_too(tmp_path: Path) -> None:
    plain = sample_report().to_dict()
    plain["seconds"], plain["total"]["conflict_rate"] = 2, 0
    CHECK.validate(plain)
    assert MergeReport.from_dict(plain).seconds == 2.0


def test_the_docs_explain_every_field() -> None:
    text = (DOCS / "report.md").read_text(encoding="utf-8")
    for kind in (MergeReport, *KINDS.values()):
        section = text.split(f"\n### {kind.__name__}\n")[1].split("\n##")[0]
        rows = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("| `")]
        assert rows == [f"`{field.name}`" for field in dataclasses.fields(kind)], kind.__name__

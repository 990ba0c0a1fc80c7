"""docs/merge.md and docs/recipes.md name everything there is, and their examples work."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import click
import numpy as np
import pytest
import yaml
from toy_checkpoints import recipe_of, toy_tensors

from taskloom.cli.merge import merge
from taskloom.cli.mergekit_flags import REFUSED_FLAGS, REFUSED_OPTIONS
from taskloom.merge.recipe import DTYPES, load_recipe
from taskloom.merge.report import Figures, MergeReport, TensorReport
from taskloom.merge.stages import METHODS, REQUIRED, Parameter

DOCS = Path(__file__).parents[2] / "docs"
MERGE, RECIPES = ((DOCS / name).read_text(encoding="utf-8") for name in ("merge.md", "recipes.md"))


def _default(parameter: Parameter) -> str:
    if parameter.default is REQUIRED:
        return "required"
    return str(yaml.safe_dump(parameter.default).split("\n")[0])


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_section_with_its_parameters(name: str) -> None:
    section = RECIPES.split(f"\n### {name}\n")[1].split("\n##")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|", section, re.MULTILINE)
    where = {(True, False): "model or recipe", (False, False): "recipe", (False, True): "recipe, one value"}
    assert rows == [
        (parameter.name, _default(parameter), where[parameter.per_model, parameter.constant]) for parameter in METHODS[name].parameters
    ]
    assert f"\n| {name} | " in MERGE


def test_every_choice_and_key_is_explained() -> None:
    for method in METHODS.values():
        for parameter in method.parameters:
            assert all(f"`{choice}`" in RECIPES for choice in parameter.choices)
    for key in ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "seed"):
        assert f"\n| `{key}` | " in RECIPES
    assert all(f"`{dtype}`" in RECIPES for dtype in DTYPES)


def test_every_option_is_documented() -> None:
    for parameter in merge.params:
        if isinstance(parameter, click.Option):
            for spelling in (*parameter.opts, *parameter.secondary_opts):
                if not (parameter.hidden and spelling.startswith(("--no-", "-v"))):
                    assert re.search(rf"`{re.escape(spelling)}( \w+)?`", MERGE), spelling


def test_every_flag_of_mergekit_has_its_reason() -> None:
    for flag, reason in (REFUSED_FLAGS | REFUSED_OPTIONS).items():
        assert f"| `--{flag}` | refused: {reason} |" in MERGE


def test_every_field_of_the_report_is_explained() -> None:
    for kind in (MergeReport, TensorReport, Figures):
        for field in fields(kind):
            assert f"`{field.name}`" in MERGE, field.name


def test_recipes_in_the_docs_are_recipes() -> None:
    blocks = _blocks(RECIPES, "yaml")
    assert blocks
    for block in blocks:
        load_recipe(yaml.safe_load(block))


def test_python_in_the_docs_runs(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe_of(models)))
    names = {"base": toy_tensors(0), "math": toy_tensors(1), "code": toy_tensors(2)}
    scope: dict[str, object] = dict(names)
    for block in _blocks(MERGE, "python"):
        exec(compile(block, "docs/merge.md", "exec"), scope)
    merged = scope["merged"]
    assert isinstance(merged, dict)
    assert all(np.isfinite(value).all() for value in merged.values())
    assert (tmp_path / "merged" / "model.safetensors").is_file()

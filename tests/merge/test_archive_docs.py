"""docs/compress.md and docs/formats.md name everything there is, and their code works."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import click
import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from toy_archives import archive_recipe, base_state, save_models, tuned_state

from taskloom.archive import CompressReport, compress_checkpoints, open_archive
from taskloom.archive.format import VERSION
from taskloom.archive.recipe import load_compress_recipe
from taskloom.archive.report import ArchiveSizes, TaskFigures
from taskloom.cli.archive import compress, extract
from taskloom.merge.stages import TALL_MASKS

DOCS = Path(__file__).parents[2] / "docs"
COMPRESS, FORMATS = ((DOCS / name).read_text(encoding="utf-8") for name in ("compress.md", "formats.md"))


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reader_in_the_docs(tmp_path: Path, dtype: torch.dtype) -> None:
    base = base_state(dtype)
    tuned = [tuned_state(base, 0), tuned_state(base, 1), tuned_state(base, 2, torch.float16)]
    recipe = archive_recipe(save_models(tmp_path, base, tuned))
    (reader,) = _blocks(FORMATS, "python")
    scope: dict[str, Callable[..., dict[str, np.ndarray]]] = {}
    exec(compile(reader, "docs/formats.md", "exec"), scope)
    for out, shard_size in ((tmp_path / "one", "5GB"), (tmp_path / "many", 200)):
        compress_checkpoints(recipe, out, shard_size=shard_size)
        for task in ("task-0", "task-1", "task-2"):
            expected = open_archive(out).state_dict(task)
            restored = scope["restore"](out, task)
            assert restored.keys() == expected.keys()
            for name, values in expected.items():
                np.testing.assert_array_equal(restored[name], values.numpy(), strict=True)


def test_metadata_is_documented(tmp_path: Path) -> None:
    base = base_state()
    compress_checkpoints(archive_recipe(save_models(tmp_path, base, [tuned_state(base, 0)])), tmp_path / "archive")
    with safe_open(tmp_path / "archive" / "tall_masks.safetensors", "np") as file:
        keys = set(file.metadata())
    table = FORMATS.split("### Metadata")[1].split("### Restoring")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == keys
    assert f"## TALL-mask archive, version {VERSION}\n" in FORMATS


def test_options_parameters_and_fields_are_documented() -> None:
    for command in (compress, extract):
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                for spelling in (*parameter.opts, *parameter.secondary_opts):
                    assert re.search(rf"`{re.escape(spelling)}( \w+)?`", COMPRESS), spelling
    for parameter in TALL_MASKS.parameters:
        default = parameter.default if isinstance(parameter.default, str) else f"{parameter.default:g}"
        assert re.search(rf"^\| `{parameter.name}` \| `?{re.escape(default)}`? \|", COMPRESS, re.MULTILINE), parameter.name
    for kind in (CompressReport, ArchiveSizes, TaskFigures):
        assert all(f"`{field.name}`" in COMPRESS for field in fields(kind))


def test_recipe_and_python_in_the_docs_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (written,) = _blocks(COMPRESS, "yaml")
    recipe = load_compress_recipe(yaml.safe_load(written))
    assert [model.task for model in recipe.models] == [None, "code"]
    base = base_state()
    models = save_models(tmp_path, base, [tuned_state(base, seed) for seed in range(2)])
    document = archive_recipe(models)
    document["models"][0]["task"] = "math"
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(document))
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in _blocks(COMPRESS, "python"):
        exec(compile(block, "docs/compress.md", "exec"), scope)
    assert isinstance(scope["weights"], dict)
    assert scope["weights"].keys() == base.keys()
    assert (tmp_path / "restored" / "model.safetensors").is_file()

"""Names with spaces, quotes and letters beyond ASCII, from the command line to the files of the output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from toy_checkpoints import save_model, save_sharded

from taskloom.merge.errors import CheckpointError, OutputError
from taskloom.merge.run import merge_checkpoints

_TENSOR = "schicht.0.größe 'q' \"r\"\t重み.weight"
_PATH = 'Übung 1: a\'b "c" #é 模型'


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command under a locale that knows ASCII alone."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LC_")} | {"LC_ALL": "C"}
    command = [sys.executable, "-m", "taskloom", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", check=False)


def test_unusual_names_from_end_to_end(tmp_path: Path) -> None:
    place = tmp_path / _PATH
    config = {"model_type": "toy", "name": "größe"}
    save_model(place / "Basis é", {_TENSOR: np.zeros(4, np.float32), "b": np.zeros(2, np.float32)}, config)
    (place / "Basis é" / "tokenizer größe.json").write_text("{}", encoding="utf-8")
    shards = {"teil é 1.safetensors": {_TENSOR: np.ones(4, np.float32)}, "teil é 2.safetensors": {"b": np.ones(2, np.float32)}}
    save_sharded(place / "-t1: {x}", shards)
    recipe = {"merge_method": "ties", "base_model": "Basis é", "models": [{"model": "./-t1: {x}", "parameters": {"weight": 1}}]}
    recipe["parameters"] = {"lambda": [{"filter": "größe 'q'", "value": 0.5}, {"value": 0.25}]}
    (place / "Rezept ü.yml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    done = _run(place, "merge", "Rezept ü.yml", "aus gäbe", "--shard-size", "16", "--report")
    assert (done.returncode, done.stderr) == (0, "")
    out = place / "aus gäbe"
    index = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))
    merged = load_file(out / index["weight_map"][_TENSOR]) | load_file(out / index["weight_map"]["b"])
    np.testing.assert_array_equal(merged[_TENSOR], np.full(4, 0.5, np.float32))
    np.testing.assert_array_equal(merged["b"], np.full(2, 0.25, np.float32))
    assert json.loads((out / "config.json").read_text(encoding="utf-8")) == config
    assert (out / "tokenizer größe.json").is_file()
    assert {tensor["name"] for tensor in json.loads((out / "merge_report.json").read_text(encoding="utf-8"))["tensors"]} == {_TENSOR, "b"}
    again = _run(tmp_path, "merge", str(out / "taskloom_recipe.yml"), "again", "--shard-size", "16", "--quiet")
    assert (again.returncode, again.stderr) == (0, "")
    for name in set(index["weight_map"].values()):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_unusual_names_in_messages(tmp_path: Path) -> None:
    (tmp_path / "Rezept ü.yml").write_text("merge_method: größe\nmodels: [{model: a}]\n", encoding="utf-8")
    done = _run(tmp_path, "merge", "Rezept ü.yml", "out")
    assert done.returncode == 1
    assert "merge_method 'größe' is unknown" in done.stderr


_BYTES = os.fsdecode(b"\xff")


def _pair(folder: Path) -> dict[str, Any]:
    save_model(folder / "base", {"w": np.zeros(2, np.float32)})
    save_model(folder / "tuned", {"w": np.ones(2, np.float32)})
    models = [{"model": str(folder / "tuned"), "parameters": {"weight": 1}}]
    return {"merge_method": "task_arithmetic", "base_model": str(folder / "base"), "models": models}


def test_a_link_hides_a_name_that_is_no_unicode(tmp_path: Path) -> None:
    folder = tmp_path / _BYTES
    folder.mkdir()
    _pair(folder)
    (tmp_path / "link").symlink_to(folder)
    merge_checkpoints(_pair(tmp_path) | {"base_model": str(tmp_path / "link" / "base")}, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == [1, 1]


def test_refuses_an_output_that_is_no_unicode(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"output '.*\\udcff': is not valid Unicode"):
        merge_checkpoints(_pair(tmp_path), tmp_path / _BYTES)


def test_refuses_a_model_that_is_no_unicode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / _BYTES).mkdir()
    recipe = _pair(tmp_path / _BYTES) | {"base_model": "base", "models": [{"model": "tuned", "parameters": {"weight": 1}}]}
    monkeypatch.chdir(tmp_path / _BYTES)
    with pytest.raises(CheckpointError, match=r"\\udcff/base': the name is not valid Unicode"):
        merge_checkpoints(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["base", "tuned"])
def test_refuses_files_of_a_model_that_are_no_unicode(tmp_path: Path, model: str) -> None:
    recipe = _pair(tmp_path)
    (tmp_path / "tuned" / "model.safetensors").rename(tmp_path / "tuned" / f"{_BYTES if model == 'tuned' else 'x'}.safetensors")
    if model == "base":
        (tmp_path / "base" / f"{_BYTES}.json").write_text("{}")
    with pytest.raises(CheckpointError, match=rf"/{model}/\\udcff\.\w+': the name is not valid Unicode"):
        merge_checkpoints(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_no_unicode_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(_pair(tmp_path)))
    done = _run(tmp_path, "merge", "recipe.yml", _BYTES)
    assert done.returncode == 1
    assert done.stderr == "Error: output '\\udcff': is not valid Unicode, which the report and the recipe beside the weights need\n"

"""The output folder: what is refused, what is left behind by failures, and every file beside the weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file
from toy_checkpoints import recipe_of, save_model, toy_tensors

from taskloom.merge import MergeError, OutputError, RecipeError, merge_checkpoints
from taskloom.merge.header import BITS, FLOATING, read_header, tensor_bytes, write_header
from taskloom.merge.recipe import load_recipe
from taskloom.merge.run import prepare, run_plan
from taskloom.merge.stages import METHODS
from taskloom.merge.templates import recipe_template

Models = dict[str, Path]


def test_refuses_folders_that_would_lose_something(models: Models, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "keep.txt").write_text("x")
    file = tmp_path / "file"
    file.write_text("x")
    cut = tmp_path / "cut.partial"
    cut.mkdir()
    (cut / "keep.txt").write_text("x")
    cases = {
        full: "is not empty",
        file: "is a file",
        tmp_path / "cut": "not a working folder that a merge left",
        models["a"]: "is the input model",
        models["base"] / "out": "lies inside the input model",
        tmp_path: "holds the input model",
    }
    before = sorted(tmp_path.rglob("*"))
    for out, message in cases.items():
        with pytest.raises(OutputError, match=message):
            merge_checkpoints(recipe_of(models), out)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_input_under_another_name_is_still_an_input(models: Models, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(models["a"])
    with pytest.raises(OutputError, match="is the input model"):
        merge_checkpoints(recipe_of(models), tmp_path / "link")


def test_an_empty_folder_is_filled_and_missing_parents_are_made(models: Models, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "x" / "y" / "out"):
        merge_checkpoints(recipe_of(models), out)
        assert (out / "model.safetensors").is_file()
        assert not out.with_name(out.name + ".partial").exists()


def test_nothing_is_left_of_a_merge_that_is_stopped(tmp_path: Path) -> None:
    folders = {
        name: save_model(tmp_path / name, {"w": np.ones((3000, 1000), np.float32) * value}) for value, name in enumerate(("base", "a", "b"))
    }
    recipe, planned = prepare(recipe_of(folders, "della_linear", parameters={"density": 0.5}))
    seen: list[int] = []

    def stop(done: int) -> None:
        seen.append(done)
        raise KeyboardInterrupt

    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        run_plan(recipe, planned, tmp_path / "out", threads=1, progress=stop)
    assert len(seen) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_left_of_a_merge_that_fails(models: Models, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    tensors = toy_tensors(1)
    tensors["lm_head.weight"][3, 2] = np.inf
    save_file(tensors, models["a"] / "model.safetensors")
    with pytest.raises(MergeError, match=r"'lm_head.weight' of model '.*/a' holds NaN or infinity, first at element 26"):
        merge_checkpoints(recipe_of(models), tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(models: Models, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(OutputError, match=r"out: cannot create .*out\.partial"):
        merge_checkpoints(recipe_of(models), closed / "out")


def test_a_file_where_a_parent_should_be(models: Models, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot create"):
        merge_checkpoints(recipe_of(models), tmp_path / "file" / "out")


def test_progress_counts_up_to_the_end(models: Models, tmp_path: Path) -> None:
    recipe, planned = prepare(recipe_of(models))
    seen: list[int] = []
    run_plan(recipe, planned, tmp_path / "out", progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == planned.progress_total


@pytest.mark.parametrize("size", ["700", "100MB"])
def test_shards_load_and_hold_what_one_file_holds(models: Models, tmp_path: Path, size: str) -> None:
    report = merge_checkpoints(recipe_of(models, "ties", parameters={"density": 0.5}), tmp_path / "out", shard_size=size)
    merge_checkpoints(recipe_of(models, "ties", parameters={"density": 0.5}), tmp_path / "whole")
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    found: dict[str, Any] = {}
    for file in (entry.name for entry in report.files):
        found |= load_file(tmp_path / "out" / file)
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert {name: value.tobytes() for name, value in found.items()} == {name: value.tobytes() for name, value in expected.items()}
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == (len(report.files) > 1)
    if index.exists():
        content = json.loads(index.read_text())
        assert set(content["weight_map"]) == set(expected)
        assert content["metadata"]["total_size"] == sum(value.nbytes for value in expected.values())
        again = recipe_of({"base": models["base"], "a": tmp_path / "out", "b": models["b"]})
        merge_checkpoints(again, tmp_path / "again")


def test_integers_and_dtypes_of_the_output(models: Models, tmp_path: Path) -> None:
    merge_checkpoints(recipe_of(models, out_dtype="bfloat16", dtype="float16"), tmp_path / "out")
    found = load_torch_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for name, tensor in found.items() if name != "model.position_ids"} == {torch.bfloat16}
    assert found["model.position_ids"].tolist() == list(range(16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("size", ["5GB", "8"])
def test_tensors_of_every_other_dtype_are_copied_bit_by_bit(tmp_path: Path, size: str) -> None:
    others = [code for code in BITS if code not in FLOATING]
    tensors = [("w", "F32", (3,)), *((f"x.{code}", code, (8, 3)) for code in others), ("x.empty", "I8", (0, 2)), ("x.scalar", "I64", ())]
    header, offsets, total = write_header(tensors)
    random = np.random.default_rng(0)
    bodies = [random.integers(0, 256, total - len(header), np.uint8).tobytes() for _ in range(2)]
    for name, body in zip(("base", "tuned"), bodies, strict=True):
        (tmp_path / f"{name}.safetensors").write_bytes(header + np.ones(3, np.float32).tobytes() + body[12:])
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base.safetensors"),
        "models": [{"model": str(tmp_path / "tuned.safetensors"), "parameters": {"weight": 1}}],
        "out_dtype": "float16",
    }
    report = merge_checkpoints(recipe, tmp_path / "out", shard_size=size)
    found = {}
    for file in (entry.name for entry in report.files):
        raw = (tmp_path / "out" / file).read_bytes()
        for name, entry in read_header(tmp_path / "out" / file).items():
            found[name] = (entry.dtype, entry.shape, raw[entry.offset : entry.offset + entry.nbytes])
    assert found["w"] == ("F16", (3,), np.ones(3, np.float16).tobytes())
    for (name, code, shape), offset in list(zip(tensors, offsets, strict=True))[1:]:
        start = offset - len(header)
        assert found[name] == (code, shape, bodies[0][start : start + tensor_bytes(code, shape)]), name


def test_files_that_come_along(models: Models, tmp_path: Path) -> None:
    base = models["base"]
    config = {"torch_dtype": "float32", "text_config": {"dtype": "float32"}, "quantization_config": {"dtype": "float32"}, "n": 1}
    (base / "config.json").write_text(json.dumps(config))
    kept = (
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "chat_template.jinja",
        "LICENSE",
        "modeling.py",
    )
    left = ("pytorch_model.bin", "optimizer.pt", "trainer_state.json", "old.safetensors.index.json", "README.md", "merge_report.json")
    for name in (*kept, *left):
        (base / name).write_text("{}")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    (base / ".git").mkdir()
    report = merge_checkpoints(recipe_of(models, dtype="float16"), tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    own = {"model.safetensors", "config.json", "README.md", "merge_report.json", "taskloom_recipe.yml"}
    assert written == own | set(kept) | {"1_Pooling"}
    assert (tmp_path / "out" / "README.md").read_text() != "{}"
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "torch_dtype": "float16",
        "text_config": {"dtype": "float16"},
        "quantization_config": {"dtype": "float32"},
        "n": 1,
    }
    assert [file.name for file in report.files] == ["model.safetensors"]
    merge_checkpoints(recipe_of(models), tmp_path / "bare", copy_tokenizer=False, write_card=False)
    bare = {path.name for path in (tmp_path / "bare").iterdir()}
    assert bare == (written - {"tokenizer.json", "tokenizer_config.json", "vocab.txt", "chat_template.jinja", "README.md"})
    assert json.loads((tmp_path / "bare" / "config.json").read_text()) == config


def test_a_single_file_as_base_has_no_config(models: Models, tmp_path: Path) -> None:
    recipe = recipe_of(models) | {"base_model": str(models["base"] / "model.safetensors")}
    merge_checkpoints(recipe, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "README.md", "merge_report.json", "taskloom_recipe.yml"}


def _weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["dare_ties", "linear", "slerp"])
def test_the_written_recipe_gives_the_same_bytes_from_anywhere(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    parameters = {"dare_ties": {"density": [0.2, 0.9]}, "linear": {"weight": 0.3}, "slerp": {"t": [0.1, 0.7]}}[method]
    monkeypatch.chdir(tmp_path)
    relative = {name: Path(name) for name in models}
    recipe = recipe_of(relative, method, weight=None if method == "slerp" else 0.6, parameters=parameters)
    if method == "slerp":
        recipe["models"] = [{"model": "base"}, {"model": "a"}]
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    merge_checkpoints("recipe.yml", "out", seed=11)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    shutil.copy(tmp_path / "out" / "taskloom_recipe.yml", elsewhere / "copy.yml")
    report = merge_checkpoints("copy.yml", "again")
    assert report.seed == 11
    assert _weights(tmp_path / "out") == _weights(elsewhere / "again")
    assert (elsewhere / "again" / "taskloom_recipe.yml").read_text() == (elsewhere / "copy.yml").read_text()


def test_seeds(models: Models, tmp_path: Path) -> None:
    recipe = recipe_of(models, "dare_linear", parameters={"density": 0.5}, seed=3)
    merge_checkpoints(recipe, tmp_path / "own")
    merge_checkpoints(recipe, tmp_path / "same", seed=3, threads=2)
    merge_checkpoints(recipe, tmp_path / "other", seed=4)
    assert _weights(tmp_path / "own") == _weights(tmp_path / "same") != _weights(tmp_path / "other")
    with pytest.raises(MergeError, match="seed: expected 0 <= seed"):
        merge_checkpoints(recipe, tmp_path / "bad", seed=2**64)


def test_the_card_names_method_and_models(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "hub" / "models--org--tuned"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("c" * 40)
    save_model(cache / "snapshots" / ("c" * 40), toy_tensors(5))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    recipe = recipe_of(models)
    recipe["models"][1]["model"] = "org/tuned"
    merge_checkpoints(recipe, tmp_path / "My-Merge")
    card = (tmp_path / "My-Merge" / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {"base_model": ["org/tuned"], "library_name": "transformers", "tags": ["merge", "taskloom"]}
    assert "# My-Merge" in text
    assert "[Task arithmetic](https://arxiv.org/abs/2212.04089)" in text
    assert "[org/tuned](https://huggingface.co/org/tuned)" in text
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == recipe
    pinned = yaml.safe_load((tmp_path / "My-Merge" / "taskloom_recipe.yml").read_text())
    assert pinned["models"][1]["model"] == "org/tuned@" + "c" * 40


@pytest.mark.parametrize("method", METHODS)
def test_templates_merge_as_they_are(models: Models, tmp_path: Path, method: str) -> None:
    text = recipe_template(METHODS[method])
    for written, folder in {"path/to/base": "base", "path/to/model-1": "a", "path/to/model-2": "b"}.items():
        text = text.replace(written, str(models[folder]))
    (tmp_path / "recipe.yml").write_text(text)
    report = merge_checkpoints(tmp_path / "recipe.yml", tmp_path / "out")
    assert report.method == method
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert set(merged) == set(toy_tensors())
    assert all(np.isfinite(value).all() for value in merged.values())


def test_mappings_may_hold_numbers_of_numpy(models: Models, tmp_path: Path) -> None:
    recipe = recipe_of(models, "task_arithmetic", np.float32(0.5), parameters={"lambda": np.array([0.5, 1.0])})
    merge_checkpoints(recipe, tmp_path / "out")
    assert load_recipe(tmp_path / "out" / "taskloom_recipe.yml").models[0].settings["weight"][0].values == (0.5,)
    with pytest.raises(RecipeError, match=r"models\[0\].parameters.weight: expected text, a number"):
        load_recipe(recipe_of(models, "task_arithmetic", object()))

"""Matching tensors by name, tied heads, and the plan that follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from toy_checkpoints import recipe_of, save_model, save_sharded, toy_tensors

from taskloom._selection import name_key
from taskloom.merge import merge_checkpoints
from taskloom.merge.align import Alignment, align
from taskloom.merge.checkpoint import Checkpoint, open_checkpoint
from taskloom.merge.errors import CheckpointError, RecipeError
from taskloom.merge.locate import locate
from taskloom.merge.run import prepare
from taskloom.merge.tied import ties_embeddings

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TIED, UNTIED = {"model_type": "toy", "tie_word_embeddings": True}, {"model_type": "toy", "tie_word_embeddings": False}


def _open(folder: Path, tensors: dict[str, Any], config: dict[str, Any] | None = UNTIED) -> Checkpoint:
    return open_checkpoint(locate(str(save_model(folder, tensors, config))))


def _align(folder: Path, base: dict[str, Any], tuned: dict[str, Any], config: dict[str, Any] | None = UNTIED) -> Alignment:
    reference, member = _open(folder / "base", base, config), _open(folder / "tuned", tuned, config)
    return align(reference, [member])


def _without(tensors: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in tensors.items() if name not in names}


def test_integers_and_recomputed_buffers_are_copied(tmp_path: Path) -> None:
    base = toy_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    found = _align(tmp_path, base, _without(toy_tensors(1), "model.position_ids"))
    copied = {tensor.name for tensor in found.tensors if tensor.members is None}
    assert copied == {"model.position_ids", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert len(found.notes) == 1
    assert "copied from" in found.notes[0]
    assert [tensor.name for tensor in found.tensors] == list(_open(tmp_path / "again", base).tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: _without(t, "model.norm.weight"), "lacks 1 of its tensors: 'model.norm.weight'"),
        (lambda t: t | {"x": np.ones(1, np.float32)}, "has 1 tensors more: 'x'"),
        (lambda t: t | {"model.norm.weight": np.ones(9, np.float32)}, r"'model.norm.weight' is \[8\] there and \[9\] here"),
        (lambda t: t | {"model.norm.weight": np.ones(8, np.int32)}, "'model.norm.weight' is F32 there and I32 here"),
        (lambda t: {"a": np.ones(1, np.float32)}, "lacks 9 of its tensors: .* and 6 more and has 1 tensors more"),
    ],
)
def test_models_that_do_not_fit_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        _align(tmp_path, toy_tensors(), change(toy_tensors(1)))
    assert str(tmp_path / "tuned") in str(caught.value)


def test_a_model_of_integers_has_nothing_to_merge(tmp_path: Path) -> None:
    tensors = {"a": np.ones(2, np.int32)}
    with pytest.raises(CheckpointError, match="no floating-point tensor"):
        _align(tmp_path, tensors, tensors)


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        (None, False),
        ({}, True),
        ({"tie_word_embeddings": False}, False),
        ({"text_config": {"tie_word_embeddings": False}}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, True),
    ],
)
def test_what_a_config_says_about_ties(tmp_path: Path, config: dict[str, Any] | None, tied: bool) -> None:
    assert ties_embeddings(_open(tmp_path, toy_tensors(), config)) == tied


def test_the_embedding_stands_for_a_head_that_a_member_ties(tmp_path: Path) -> None:
    found = _align(tmp_path, toy_tensors(), _without(toy_tensors(1), HEAD), TIED)
    head = next(tensor for tensor in found.tensors if tensor.name == HEAD)
    assert head.setting_name == EMBEDDING
    assert head.members is not None
    embedding = next(tensor for tensor in found.tensors if tensor.name == EMBEDDING)
    assert embedding.members is not None
    assert head.members[0] == embedding.members[0]
    assert any("is tied, its" in note for note in found.notes)


def test_a_second_copy_of_a_tied_head_is_left_out(tmp_path: Path) -> None:
    found = _align(tmp_path, _without(toy_tensors(), HEAD), toy_tensors(1), TIED)
    assert HEAD not in {tensor.name for tensor in found.tensors}
    assert any("left out" in note for note in found.notes)


@pytest.mark.parametrize("config", [UNTIED, None])
def test_an_untied_head_may_not_be_missing(tmp_path: Path, config: dict[str, Any] | None) -> None:
    with pytest.raises(CheckpointError, match="lm_head") as caught:
        _align(tmp_path, toy_tensors(), _without(toy_tensors(1), HEAD), config)
    assert ("no config.json says" in str(caught.value)) == (config is None)


def test_tied_heads_stored_twice_get_one_random_mask(tmp_path: Path) -> None:
    models = []
    for seed in range(2):
        tensors = toy_tensors(seed)
        models.append(save_model(tmp_path / str(seed), tensors | {HEAD: tensors[EMBEDDING].copy()}, TIED))
    recipe = {
        "merge_method": "dare_linear",
        "base_model": str(models[0]),
        "models": [{"model": str(models[1]), "parameters": {"weight": 1, "density": 0.5}}],
    }
    merge_checkpoints(recipe, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged[HEAD].tobytes() == merged[EMBEDDING].tobytes()


def test_a_plan_holds_every_byte_before_any_work(models: dict[str, Path]) -> None:
    _, planned = prepare(recipe_of(models), shard_size=1000)
    plan = planned.plan
    assert {job.name for job in plan.jobs} == set(toy_tensors())
    assert sum(file.size - len(file.header) for file in plan.outputs) == plan.total_size
    assert planned.bytes_in == 3 * sum(v.nbytes for v in toy_tensors().values() if v.dtype == np.float32) + 16 * 8
    for number, file in enumerate(plan.outputs):
        ends = sorted((job.target.offset, job.name) for job in plan.jobs if job.target.file == number)
        assert ends[0][0] == len(file.header)
    merged = next(job for job in plan.jobs if job.name == "model.layers.2.mlp.up_proj.weight")
    assert (merged.layer, merged.key, merged.base is None) == (2, name_key(merged.name), False)
    copied = next(job for job in plan.jobs if job.name == "model.position_ids")
    assert (copied.stages, copied.layer, copied.target.dtype) == (None, None, "I64")


def test_a_band_that_keeps_nothing_is_noted(models: dict[str, Path]) -> None:
    def notes(**parameters: Any) -> list[str]:
        _, planned = prepare(recipe_of(models, "breadcrumbs", parameters=parameters))
        return [note for note in planned.notes if "nothing of a model's delta" in note]

    assert notes(density=0.2, scope="tensor") == []
    assert notes(density=0.0, scope="row") == []
    (note,) = notes(density=0.1, scope="row")
    assert "in 9 tensors" in note
    assert "and 6 more" in note


def test_a_band_that_is_clipped_is_noted(models: dict[str, Path]) -> None:
    def notes(**parameters: Any) -> list[str]:
        _, planned = prepare(recipe_of(models, "breadcrumbs", parameters=parameters))
        return [note for note in planned.notes if "fewer entries than density says" in note]

    assert notes(density=0.9, gamma=0.3) == []
    assert notes(density=0.9, gamma=0.3, on_overflow="drop", outliers_first=False) == []
    assert notes(density=0.5, gamma=0.1, on_overflow="drop") == []
    for scope in ("tensor", "row", "model"):
        (note,) = notes(density=0.9, gamma=0.3, on_overflow="drop", scope=scope)
        assert "in 9 tensors" in note


def test_sharded_inputs_in_another_order_give_the_same_bits(models: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(models["b"] / "model.safetensors")
    names = sorted(tensors, reverse=True)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    sharded = save_sharded(tmp_path / "sharded", {file: {name: tensors[name] for name in part} for file, part in halves.items()})
    recipe = recipe_of(models, "ties", parameters={"density": 0.3, "scope": "model"})
    merge_checkpoints(recipe, tmp_path / "one")
    recipe["models"][1]["model"] = str(sharded)
    merge_checkpoints(recipe, tmp_path / "two", threads=1)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (tmp_path / "two" / "model.safetensors").read_bytes()


def test_names_hash_the_same_everywhere() -> None:
    # FNV-1a test vectors (Noll): the offset basis, "a" and "foobar".
    assert [name_key(text) for text in ("", "a", "foobar")] == [0xCBF29CE484222325, 0xAF63DC4C8601EC8C, 0x85944171F73967E8]


def test_parts_that_models_play(models: dict[str, Path]) -> None:
    with_base = [{"model": str(models[name]), "parameters": {"weight": 1}} for name in ("base", "a")]
    _, delta = prepare(recipe_of(models, models=with_base))
    assert [Path(label).name for label in delta.plan.models] == ["a"]
    _, linear = prepare(recipe_of(models, "linear", parameters={"weight": 1}))
    assert [Path(label).name for label in linear.plan.models] == ["a", "b", "base"]
    _, listed = prepare(recipe_of(models, "linear", models=with_base))
    assert [Path(label).name for label in listed.plan.models] == ["base", "a"]


@pytest.mark.parametrize(
    ("names", "method", "message"),
    [
        (("a", "a"), "ties", "listed twice"),
        (("base",), "ties", "lists only the base"),
        (("a", "b"), "slerp", "slerp takes 1 model besides base_model, got 2"),
        (("a", "b"), "passthrough", "passthrough takes 1 model, got"),
    ],
)
def test_refused_casts(models: dict[str, Path], names: tuple[str, ...], method: str, message: str) -> None:
    parameters = {"slerp": {"t": 0.5}, "passthrough": {}}.get(method, {"weight": 1})
    recipe = recipe_of(models, method, models=[{"model": str(models[name])} for name in names], parameters=parameters)
    if method == "passthrough":
        del recipe["base_model"]
    with pytest.raises(RecipeError, match=message):
        prepare(recipe)

"""Task vectors in merges: beside state dicts, and as differences of checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_state_dicts import SHARED, StateDict, _models, _parameters
from toy_checkpoints import save_model, toy_tensors

from taskloom import TaskVector
from taskloom.merge import (
    CheckpointError,
    MergeError,
    OutputError,
    RecipeError,
    merge_checkpoints,
    merge_state_dicts,
    merge_task_vectors,
    verify_merge,
)
from taskloom.merge.stages import METHODS

DELTA_METHODS = [name for name, method in METHODS.items() if method.base == "required" and name != "slerp"]


@pytest.mark.parametrize("method", [*DELTA_METHODS, "linear", "slerp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vector_merges_as_its_model_does(method: str, dtype: torch.dtype) -> None:
    base, *tuned = _models(dtype)
    tuned = tuned[: METHODS[method].max_models]
    # The base is one of the models that linear averages.
    parameters = {"weight": 0.5} if method == "linear" else _parameters(method)
    expected = merge_state_dicts(base, tuned, method, seed=5, **parameters)
    vectors = [TaskVector(base, state) for state in tuned]
    for models in (vectors, [vectors[0], *tuned[1:]]):
        got = merge_state_dicts(base, models, method, seed=5, **parameters)
        assert list(got) == list(expected)
        for name, tensor in got.items():
            assert tensor.dtype == expected[name].dtype
            assert torch.equal(tensor, expected[name]), name


def test_labels_and_dtypes() -> None:
    base, one, two = _models(count=3)
    models = {"a": TaskVector(base, one), "b": two}
    got = merge_state_dicts(base, models, "ties", weight=0.5, density=0.5, out_dtype="bfloat16")
    expected = merge_state_dicts(base, {"a": one, "b": two}, "ties", weight=0.5, density=0.5, out_dtype="bfloat16")
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_negated_vector_forgets() -> None:
    base, tuned = _models(count=2)
    tau = TaskVector(base, tuned)
    got = merge_state_dicts(base, [-tau], "ties", weight=1.0, density=1.0)
    for name in tau:
        torch.testing.assert_close(got[name], base[name] - tau[name])


def test_tied_weights_stay_one_tensor() -> None:
    base, tuned = _models(count=2)
    for state in (base, tuned):
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    got = merge_state_dicts(base, [2 * TaskVector(base, tuned)], "task_arithmetic", weight=1.0)
    assert got["lm_head.weight"] is got["model.embed_tokens.weight"]


def test_what_does_not_fit_beside_state_dicts() -> None:
    base, tuned = _models(count=2)
    tau = TaskVector(base, tuned)
    with pytest.raises(RecipeError, match="needs a base"):
        merge_state_dicts(None, [tau], "linear", weight=1.0)
    with pytest.raises(RecipeError, match="both regimes"):
        merge_state_dicts(base, [tau, tau.as_regime("linear")], "task_arithmetic", weight=1.0)
    with pytest.raises(CheckpointError, match=r"tuned\[0\]: has a delta of 'other', which base lacks"):
        merge_state_dicts(base, [TaskVector.from_deltas({"other": torch.ones(2)})], "task_arithmetic", weight=1.0)
    with pytest.raises(CheckpointError, match="lacks"):
        merge_state_dicts(base, [TaskVector.from_deltas({"model.norm.weight": torch.ones(8)})], "task_arithmetic", weight=1.0)
    with pytest.raises(CheckpointError, match=r"base: 'model\.embed_tokens\.weight': expected a tensor, got ndarray"):
        merge_state_dicts(toy_tensors(), [tau], "task_arithmetic", weight=1.0)
    big = {name: torch.full_like(tensor, 3e38) for name, tensor in tau.items()}
    with pytest.raises(MergeError, match=r"too large for torch\.float32|overflow"):
        merge_state_dicts({**base, **big}, [TaskVector.from_deltas(big)], "task_arithmetic", weight=1.0)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A base and two tunings, the base with a config."""
    made = {
        name: save_model(tmp_path / name, toy_tensors(seed), {"tie_word_embeddings": False}) for seed, name in enumerate(("base", "a", "b"))
    }
    (made["base"] / "tokenizer.json").write_text("{}")
    return made


def _load(folder: Path) -> StateDict:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _vectors(folders: dict[str, Path]) -> tuple[TaskVector, TaskVector]:
    return TaskVector.from_checkpoints(folders["base"], folders["a"]), TaskVector.from_checkpoints(folders["base"], folders["b"])


def test_apply_to_checkpoint_is_apply_to_on_disk(folders: dict[str, Path], tmp_path: Path) -> None:
    one, two = _vectors(folders)
    base = _load(folders["base"])
    combined = 2 * one - two / 4
    for number, (vector, alpha) in enumerate(((one, 1.0), (-one, 0.7), (combined, 0.3), (one - one, 1.0), (one, 0.0))):
        out = tmp_path / f"out{number}"
        report = vector.apply_to_checkpoint(folders["base"], out, alpha, shard_size=700)
        expected = vector.apply_to(base, alpha)
        got = _load(out)
        assert got.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())
        assert (out / "tokenizer.json").is_file()
        assert report.total is not None
    assert all(torch.equal(tensor, base[name]) for name, tensor in _load(tmp_path / "out3").items())
    # alpha = 1 gives the fine-tuned model back, up to the rounding of the sum.
    tuned = _load(folders["a"])
    for name, tensor in _load(tmp_path / "out0").items():
        torch.testing.assert_close(tensor, tuned[name] if name != "model.position_ids" else base[name], rtol=1e-6, atol=1e-6)


def test_the_recipe_beside_the_weights_gives_the_same_again(folders: dict[str, Path], tmp_path: Path) -> None:
    one, two = _vectors(folders)
    (one - 0.5 * two).apply_to_checkpoint(folders["base"], tmp_path / "out", 0.5)
    assert verify_merge(tmp_path / "out").ok
    merge_checkpoints(tmp_path / "out" / "taskloom_recipe.yml", tmp_path / "again")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


def test_options_are_those_of_a_merge(folders: dict[str, Path], tmp_path: Path) -> None:
    one, two = _vectors(folders)
    done: list[int] = []
    one.apply_to_checkpoint(folders["base"], tmp_path / "out", threads=2, progress=done.append, write_card=False, copy_tokenizer=False)
    assert done
    assert not (tmp_path / "out" / "README.md").exists()
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    with pytest.raises(OutputError, match="is not empty"):
        two.apply_to_checkpoint(folders["base"], tmp_path / "out")
    with pytest.raises(MergeError, match="threads: expected 0"):
        two.apply_to_checkpoint(folders["base"], tmp_path / "other", threads=-1)
    merge_task_vectors([two], tmp_path / "out", overwrite=True, out_dtype="bfloat16", max_ram="2GB")
    expected = two.apply_to(_load(folders["base"]))
    for name, tensor in _load(tmp_path / "out").items():
        assert torch.equal(tensor, expected[name].bfloat16() if name in two else expected[name])


def test_a_saved_vector_goes_onto_another_base(folders: dict[str, Path], tmp_path: Path) -> None:
    one, two = _vectors(folders)
    (one + two).save(tmp_path / "sum.safetensors")
    loaded = TaskVector.load(tmp_path / "sum.safetensors")
    (-loaded).apply_to_checkpoint(folders["b"], tmp_path / "out", 0.5)
    assert verify_merge(tmp_path / "out").ok
    expected = (one + two).apply_to(_load(folders["b"]), -0.5)
    got = _load(tmp_path / "out")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())


def test_what_apply_to_checkpoint_refuses(folders: dict[str, Path], tmp_path: Path) -> None:
    one, two = _vectors(folders)
    memory = TaskVector(_load(folders["base"]), _load(folders["a"]))
    with pytest.raises(ValueError, match=r"got a term that is in memory; vector.save\(path\)"):
        memory.apply_to_checkpoint(folders["base"], tmp_path / "out")
    with pytest.raises(ValueError, match=r"from '.*base', expected '.*/b'; for another base, vector.save"):
        one.apply_to_checkpoint(folders["b"], tmp_path / "out")
    narrow = TaskVector.from_checkpoints(folders["base"], folders["a"], dtype=torch.float16)
    with pytest.raises(ValueError, match=r"are rounded to torch.float16, a merge's are not"):
        narrow.apply_to_checkpoint(folders["base"], tmp_path / "out")
    with pytest.raises(ValueError, match="alpha: expected a finite number, got nan"):
        one.apply_to_checkpoint(folders["base"], tmp_path / "out", float("nan"))
    with pytest.raises(OutputError):
        one.apply_to_checkpoint(folders["base"], folders["a"])
    save_model(folders["a"], toy_tensors(7))
    with pytest.raises(CheckpointError, match="changed"):
        (one + two).apply_to_checkpoint(folders["base"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", DELTA_METHODS)
def test_merge_task_vectors_is_the_merge_of_the_checkpoints(folders: dict[str, Path], tmp_path: Path, method: str) -> None:
    one, two = _vectors(folders)
    shared: dict[str, Any] = {name: value for name, value in SHARED[method].items() if not isinstance(value, list)}
    shared |= {name: 0.6 for name in ("density",) if METHODS[method].parameter(name)}
    merge_task_vectors({one: 0.5, two: 1.5}, tmp_path / "out", method, parameters=shared, seed=3)
    models = [{"model": str(folders[name]), "parameters": {"weight": weight}} for name, weight in (("a", 0.5), ("b", 1.5))]
    recipe = {"merge_method": method, "base_model": str(folders["base"]), "models": models, "parameters": shared}
    merge_checkpoints(recipe, tmp_path / "expected", seed=3)
    got, expected = _load(tmp_path / "out"), _load(tmp_path / "expected")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())


@pytest.mark.parametrize("method", ["ties", "dare_linear", "breadcrumbs", "magnitude", "task_arithmetic"])
def test_multiples_and_negations_merge_as_their_values_do(folders: dict[str, Path], tmp_path: Path, method: str) -> None:
    one, two = _vectors(folders)
    parameters: dict[str, Any] = {"normalize": False} | ({"density": 0.5} if method != "task_arithmetic" else {})
    merge_task_vectors({-one: 1.0, 2 * two: 0.5}, tmp_path / "out", method, parameters=parameters, seed=3)
    vectors = [(-one).materialize(), (2 * two).materialize()]
    expected = merge_state_dicts(_load(folders["base"]), vectors, method, seed=3, weight=[1.0, 0.5], **parameters)
    for name, tensor in _load(tmp_path / "out").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


def test_sums_in_task_arithmetic(folders: dict[str, Path], tmp_path: Path) -> None:
    one, two = _vectors(folders)
    merge_task_vectors([one + two, one - two], tmp_path / "out")
    expected = (2 * one).apply_to(_load(folders["base"]))
    for name, tensor in _load(tmp_path / "out").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


def test_what_merge_task_vectors_refuses(folders: dict[str, Path], tmp_path: Path) -> None:
    one, two = _vectors(folders)
    out = tmp_path / "out"
    for vectors, method, options, kind, words in (
        ([], "ties", {}, ValueError, "at least one vector"),
        ([one, one], "ties", {}, ValueError, "listed twice"),
        (one, "ties", {}, TypeError, "expected a mapping from vectors to weights"),
        ([folders["a"]], "ties", {}, TypeError, "expected TaskVectors, got PosixPath"),
        ([one, two.as_regime("linear")], "ties", {}, ValueError, "both regimes"),
        ([one - one], "ties", {}, ValueError, "other than zero"),
        ([one], "linear", {}, ValueError, "linear merges values, not differences"),
        ([one], "slerp", {}, ValueError, "slerp merges values"),
        ([one], "tie", {}, RecipeError, "did you mean 'ties'"),
        ([one], "ties", {"parameters": {"weight": 1}}, ValueError, "weights are given as"),
        ([-one], "ties", {}, ValueError, "ties divides by the weights.*set normalize: False"),
        ([-one], "ties", {"parameters": {"normalize": False, "elect": "count"}}, ValueError, "ties counts signs"),
        ([2 * one], "consensus_ta", {}, ValueError, "consensus_ta compares differences with their sum"),
        ([one + two], "ties", {}, ValueError, "only task_arithmetic takes sums"),
        ({one: float("inf")}, "ties", {}, ValueError, "weight: expected a finite number"),
        ([TaskVector.from_checkpoints(folders["b"], folders["a"]), one], "ties", {}, ValueError, "for another base"),
    ):
        with pytest.raises(kind, match=words):
            merge_task_vectors(vectors, out, method, **options)
        assert not out.exists()


def test_a_change_of_the_working_directory(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tau = TaskVector.from_checkpoints("base", "a")
    os.mkdir("elsewhere")
    monkeypatch.chdir("elsewhere")
    tau.apply_to_checkpoint("../base", tmp_path / "out")
    assert np.isclose(tau.norm(), TaskVector(_load(folders["base"]), _load(folders["a"])).norm())


def test_bfloat16_checkpoints_come_back(tmp_path: Path) -> None:
    models = [{name: torch.from_numpy(value).bfloat16() for name, value in toy_tensors(seed).items()} for seed in (0, 1)]
    for name, tensors in zip(("base", "tuned"), models, strict=True):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    tau = TaskVector.from_checkpoints(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    tau.apply_to_checkpoint(tmp_path / "base.safetensors", tmp_path / "out")
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in _load(tmp_path / "out").items())

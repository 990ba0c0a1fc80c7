"""taskloom compress: the archive's every bit against numpy, its report, and what is refused."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from toy_archives import (
    State,
    archive_recipe,
    as_float,
    base_state,
    load_model,
    numpy_mask,
    numpy_sum_vector,
    numpy_ties_vector,
    save_models,
    save_state,
    tuned_state,
)
from toy_checkpoints import save_sharded

from taskloom.archive import compress_checkpoints, open_archive
from taskloom.archive import pieces as pieces_module
from taskloom.archive.planned import plan_archive
from taskloom.archive.report import build_report
from taskloom.merge import CheckpointError, MergeError, OutputError, RecipeError, merge_checkpoints
from taskloom.merge.recipe import load_recipe

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NEVER_MASKED = "position_ids"


def _floats(state: State) -> dict[str, np.ndarray]:
    return {name: as_float(values) for name, values in state.items() if values.is_floating_point()}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 16 entries, so that small tensors have several."""
    for function in (pieces_module.cut_pieces, pieces_module.count_pieces):
        monkeypatch.setattr(function, "__defaults__", (16,))


def _check_archive(out: Path, base: State, tuned: list[State], vectors: dict[str, np.ndarray], thresholds: list[float]) -> None:
    stored = load_file(out / "tall_masks.safetensors")
    floats, others = _floats(base), [_floats(state) for state in tuned]
    expected = {f"base/{name}" for name in base} | {f"vector/{name}" for name in floats}
    expected |= {f"mask/task-{number}/{name}" for number in range(len(tuned)) for name in floats}
    assert set(stored) == expected
    for name, values in base.items():
        assert stored[f"base/{name}"].dtype == values.dtype
        assert torch.equal(stored[f"base/{name}"], values)
    for name, origin in floats.items():
        np.testing.assert_array_equal(stored[f"vector/{name}"].numpy(), vectors[name], strict=True)
        for number, state in enumerate(others):
            mask = stored[f"mask/task-{number}/{name}"].numpy()
            np.testing.assert_array_equal(mask, numpy_mask(origin, state[name], vectors[name], thresholds[number]), strict=True)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("tasks", [1, 2, 9])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_every_bit_is_the_naive_formula_s(tmp_path: Path, tasks: int, dtype: torch.dtype) -> None:
    base = base_state(dtype)
    tuned = [tuned_state(base, seed) for seed in range(tasks)]
    thresholds = [(0.2, 0.4, 1.0)[number % 3] for number in range(tasks)]
    report = compress_checkpoints(archive_recipe(save_models(tmp_path, base, tuned), thresholds), tmp_path / "out", threads=2)
    floats, others = _floats(base), [_floats(state) for state in tuned]
    vectors = {name: numpy_sum_vector(origin, [state[name] for state in others]) for name, origin in floats.items()}
    _check_archive(tmp_path / "out", base, tuned, vectors, thresholds)
    for number, task in enumerate(report.tasks):
        moved = sum(float(np.sum((others[number][name] - origin).astype(np.float64) ** 2)) for name, origin in floats.items())
        missed = ones = 0.0
        for name, origin in floats.items():
            packed = numpy_mask(origin, others[number][name], vectors[name], thresholds[number])
            mask = np.unpackbits(packed, bitorder="little")[: origin.size].reshape(origin.shape)
            restored = as_float(torch.from_numpy(np.asarray(origin + mask.astype(origin.dtype) * vectors[name])).to(dtype))
            missed += float(np.sum((restored - others[number][name]).astype(np.float64) ** 2))
            ones += mask.sum()
        assert task.relative_error == pytest.approx(math.sqrt(missed / moved), rel=1e-5)
        assert task.mask_density == ones / report.parameters


@pytest.mark.usefixtures("small_pieces")
def test_mixed_dtypes(tmp_path: Path) -> None:
    base = base_state(BF16) | {"wide": torch.randn(11, dtype=F64)}
    tuned = [tuned_state(base, 0, F32), tuned_state(base, 1, F16), tuned_state(base, 2)]
    compress_checkpoints(archive_recipe(save_models(tmp_path, base, tuned)), tmp_path / "out")
    floats, others = _floats(base), [_floats(state) for state in tuned]
    vectors = {}
    for name, origin in floats.items():
        kind = F64 if name == "wide" else F32
        origins = torch.from_numpy(origin).to(kind).numpy()
        vectors[name] = numpy_sum_vector(origins, [state[name].astype(origins.dtype) for state in others])
    _check_archive(tmp_path / "out", base, tuned, vectors, [0.4] * 3)
    info = open_archive(tmp_path / "out").info
    assert [set(task.dtypes.values()) for task in info.tasks] == [{"F32"}, {"F16"}, set()]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("density", [0.01, 0.2, 1.0])
@pytest.mark.parametrize(("tasks", "kind"), [(1, "float"), (3, "float"), (4, "ties"), (4, "negative"), (3, "bf16"), (3, "f64")])
def test_ties_vector(tmp_path: Path, density: float, tasks: int, kind: str) -> None:
    base = base_state({"bf16": BF16, "f64": F64}.get(kind, F32))
    tuned = [tuned_state(base, seed) for seed in range(tasks)]
    if kind in ("ties", "negative"):
        # Differences of few values: equal magnitudes across pieces and tensors, and votes of exactly zero.
        shift = 0.0 if kind == "ties" else -1.0
        base = {name: torch.zeros_like(values) if values.is_floating_point() else values for name, values in base.items()}
        generator = torch.Generator().manual_seed(5)
        for state in tuned:
            for name, values in state.items():
                if values.is_floating_point():
                    state[name] = torch.randint(-2, 3, values.shape, generator=generator).float() + shift
    models = save_models(tmp_path, base, tuned)
    compress_checkpoints(archive_recipe(models, vector="ties", density=density), tmp_path / "out", threads=2)
    vectors = numpy_ties_vector(_floats(base), [_floats(state) for state in tuned], density)
    _check_archive(tmp_path / "out", base, tuned, vectors, [0.4] * tasks)


def test_ties_vector_is_that_of_a_consensus_merge(tmp_path: Path) -> None:
    base = base_state()
    models = save_models(tmp_path, base, [tuned_state(base, seed) for seed in range(3)])
    recipe = archive_recipe(models, vector="ties")
    compress_checkpoints(recipe, tmp_path / "out")
    merge_checkpoints({**recipe, "merge_method": "consensus_ties", "parameters": {"consensus_k": 0, "lambda": 1}}, tmp_path / "merged")
    merged, stored = load_model(tmp_path / "merged"), load_file(tmp_path / "out" / "tall_masks.safetensors")
    for name, values in base.items():
        if values.is_floating_point():
            assert torch.equal(stored[f"base/{name}"] + stored[f"vector/{name}"], merged[name]), name


def test_the_archive_does_not_depend_on_threads_pieces_or_shards_of_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_state(BF16)
    tuned = [tuned_state(base, seed) for seed in range(3)]
    recipe = archive_recipe(save_models(tmp_path, base, tuned), vector="ties", density=0.3)
    compress_checkpoints(recipe, tmp_path / "one", threads=1)
    for function in (pieces_module.cut_pieces, pieces_module.count_pieces):
        monkeypatch.setattr(function, "__defaults__", (8,))
    compress_checkpoints(recipe, tmp_path / "many", threads=5)
    assert (tmp_path / "one" / "tall_masks.safetensors").read_bytes() == (tmp_path / "many" / "tall_masks.safetensors").read_bytes()


def test_masks_shrink_as_lambda_grows(tmp_path: Path) -> None:
    base = base_state()
    models = save_models(tmp_path, base, [tuned_state(base, seed) for seed in range(3)])
    masks = []
    for number, threshold in enumerate((0.2, 0.4, 0.6, 1.0)):
        compress_checkpoints(archive_recipe(models, [threshold] * 3), tmp_path / f"out-{number}")
        masks.append(open_archive(tmp_path / f"out-{number}").masks("task-1"))
    for looser, stricter in pairwise(masks):
        assert all(torch.equal(looser[name] & stricter[name], stricter[name]) for name in looser)
    assert any(not torch.equal(masks[0][name], masks[-1][name]) for name in masks[0])


def test_folder_and_plain_safetensors(tmp_path: Path) -> None:
    base = base_state()
    models = save_models(tmp_path, base, [tuned_state(base, seed) for seed in range(2)])
    report = compress_checkpoints(archive_recipe(models, [0.3, 0.5]), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"tall_masks.safetensors", "config.json", "tokenizer.json", "compress_report.json", "taskloom_recipe.yml"}
    with safe_open(tmp_path / "out" / "tall_masks.safetensors", "np") as file:
        metadata = file.metadata()
        assert file.get_tensor("mask/task-1/model.layers.0.w/q.weight").shape == (3,)
        assert file.get_tensor("mask/task-1/scale").shape == (1,)
        assert file.get_tensor("mask/task-1/none").shape == (0,)
    assert (metadata["format"], metadata["taskloom_archive"], metadata["taskloom_archive_version"]) == ("pt", "tall_masks", "1")
    assert [(task["name"], task["tall_mask_lambda"]) for task in json.loads(metadata["tasks"])] == [("task-0", 0.3), ("task-1", 0.5)]
    assert json.loads((tmp_path / "out" / "compress_report.json").read_text()) == report.to_dict()
    pinned = yaml.safe_load((tmp_path / "out" / "taskloom_recipe.yml").read_text())
    assert [entry["task"] for entry in pinned["models"]] == ["task-0", "task-1"]
    compress_checkpoints(pinned, tmp_path / "again")
    assert load_file(tmp_path / "again" / "tall_masks.safetensors").keys() == load_file(tmp_path / "out" / "tall_masks.safetensors").keys()


def test_report_counts_bytes(tmp_path: Path) -> None:
    base = base_state()
    models = save_models(tmp_path, base, [tuned_state(base, seed) for seed in range(2)])
    report = compress_checkpoints(archive_recipe(models), tmp_path / "out")
    sizes, files = report.sizes, {name: (path / "model.safetensors").stat().st_size for name, path in models.items()}
    assert sizes.archive == (tmp_path / "out" / "tall_masks.safetensors").stat().st_size
    assert sizes.separate == files["task-0"] + files["task-1"]
    assert sizes.separate_and_base == sizes.separate + files["base"]
    assert report.parameters == sum(values.numel() for values in base.values() if values.is_floating_point())
    assert sizes.vector == 4 * report.parameters
    assert sizes.base == 4 * report.parameters + 6 * 8
    assert sizes.masks == 2 * sum(-(-values.numel() // 8) for values in base.values() if values.is_floating_point())
    assert report.copied == ["position_ids"]
    assert report.version == 1


@pytest.mark.parametrize(("dtype", "fewest"), [(F32, 3), (BF16, 4)])
def test_too_few_tasks_are_noted(tmp_path: Path, dtype: torch.dtype, fewest: int) -> None:
    base = {"w": torch.randn(100, 1000).to(dtype)}
    models = save_models(tmp_path, base, [tuned_state(base, seed) for seed in range(fewest)])
    notes = [f"it takes less from {fewest} such tasks on" in " ".join(build_report(plan_archive(archive_recipe(models)), None).notes)]
    del models[f"task-{fewest - 1}"]
    notes.append(f"it takes less from {fewest} such tasks on" in " ".join(build_report(plan_archive(archive_recipe(models)), None).notes))
    assert notes == [False, True]


def test_shards_have_an_index_and_the_same_tensors(tmp_path: Path) -> None:
    base = base_state()
    recipe = archive_recipe(save_models(tmp_path, base, [tuned_state(base, seed) for seed in range(2)]))
    compress_checkpoints(recipe, tmp_path / "one")
    compress_checkpoints(recipe, tmp_path / "many", shard_size=200)
    index = json.loads((tmp_path / "many" / "tall_masks.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files[0] == f"tall_masks-00001-of-{len(files):05d}.safetensors"
    whole = load_file(tmp_path / "one" / "tall_masks.safetensors")
    parts: State = {}
    for file in files:
        parts |= load_file(tmp_path / "many" / file)
    assert parts.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert open_archive(tmp_path / "many").tasks == ("task-0", "task-1")


def test_sharded_inputs(tmp_path: Path) -> None:
    arrays = {name: np.random.default_rng(seed).normal(size=(5, 3)).astype(np.float32) for seed, name in enumerate("abc")}
    moved = {name: values + 1 for name, values in arrays.items()}
    for folder, state in (("base", arrays), ("task-0", moved)):
        save_sharded(tmp_path / folder, {"x-1.safetensors": {"a": state["a"]}, "x-2.safetensors": {"b": state["b"], "c": state["c"]}})
    models = {"base": tmp_path / "base", "task-0": tmp_path / "task-0"}
    compress_checkpoints(archive_recipe(models), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "tall_masks.safetensors")
    for name, values in arrays.items():
        np.testing.assert_array_equal(stored[f"vector/{name}"].numpy(), moved[name] - values)


def test_tied_heads(tmp_path: Path) -> None:
    base = base_state()
    with_head = {**base, "lm_head.weight": base["model.embed_tokens.weight"].clone()}
    tuned = tuned_state(base, 0)
    models = save_models(tmp_path, with_head, [tuned])
    (models["task-0"] / "config.json").write_text('{"tie_word_embeddings": true}')
    report = compress_checkpoints(archive_recipe(models), tmp_path / "out")
    assert any("lm_head.weight is tied" in note for note in report.notes)
    restored = open_archive(tmp_path / "out").state_dict("task-0")
    torch.testing.assert_close(restored["lm_head.weight"], tuned["model.embed_tokens.weight"], rtol=1e-6, atol=1e-7)


def test_a_base_among_the_models_is_no_task(tmp_path: Path) -> None:
    base = base_state()
    models = save_models(tmp_path, base, [tuned_state(base, 0)])
    recipe = archive_recipe(models)
    recipe["models"].insert(0, {"model": str(models["base"])})
    compress_checkpoints(recipe, tmp_path / "out")
    assert open_archive(tmp_path / "out").tasks == ("task-0",)


def test_a_task_that_equals_the_base(tmp_path: Path) -> None:
    base = base_state()
    report = compress_checkpoints(archive_recipe(save_models(tmp_path, base, [base, tuned_state(base, 1)])), tmp_path / "out")
    assert (report.tasks[0].relative_error, report.tasks[0].mask_density) == (None, 0.0)


def test_task_names(tmp_path: Path) -> None:
    base = base_state()
    models = save_models(tmp_path, base, [tuned_state(base, 0), tuned_state(base, 1)])
    file = models["task-1"] / "model.safetensors"
    recipe = archive_recipe({**models, "task-1": file.rename(file.with_name("Math-1.5.safetensors"))})
    recipe["models"][0]["task"] = "a b.c"
    compress_checkpoints(recipe, tmp_path / "out")
    assert open_archive(tmp_path / "out").tasks == ("a b.c", "Math-1.5")


def _with(recipe: dict[str, Any], **changes: Any) -> dict[str, Any]:
    first = {**recipe["models"][0], **changes}
    return {**recipe, "models": [first, *recipe["models"][1:]]}


def test_refused_recipes(tmp_path: Path) -> None:
    base = base_state()
    recipe = archive_recipe(save_models(tmp_path, base, [tuned_state(base, 0), tuned_state(base, 1)]))
    cases: list[tuple[dict[str, Any], str]] = [
        ({**recipe, "merge_method": "ties"}, "merge_method 'ties' makes a merged model and not an archive; run taskloom merge"),
        (
            {**recipe, "merge_method": "tall_mask"},
            "'tall_mask' is unknown; compress knows tall_masks; did you mean 'tall_masks'",
        ),
        ({**recipe, "dtype": "bfloat16"}, "key 'dtype' has no place in tall_masks"),
        ({**recipe, "out_dtype": "bfloat16"}, "key 'out_dtype' has no place in tall_masks"),
        ({**recipe, "seed": 1}, "key 'seed' has no place"),
        ({**recipe, "base_model": None}, "key 'base_model' is missing"),
        ({**recipe, "models": [{"model": recipe["base_model"]}]}, "lists only the base"),
        ({**recipe, "parameters": {"density": 0.2}}, "'density' is the share that the trim of vector: ties keeps; vector is sum"),
        ({**recipe, "parameters": {"vector": "mean"}}, "parameters.vector: expected one of sum, ties, got 'mean'"),
        ({**recipe, "parameters": {"vector": "ties", "density": 0}}, "parameters.density: expected more than 0"),
        ({**recipe, "parameters": {"lambda": 1}}, "tall_masks has no parameter 'lambda'"),
        (_with(recipe, task="x/y"), "task name 'x/y' of model .* must not contain a slash"),
        (_with(recipe, task=".."), "must not begin with a dot"),
        (_with(recipe, task="a\n"), "must be printable"),
        (_with(recipe, task=""), "models\\[0\\].task"),
        (_with(recipe, task="task-1"), "are both task 'task-1'; name them with their keys 'task'"),
        (_with(recipe, name="a"), "unknown key 'name'"),
    ]
    for value, message in {
        0: "expected more than 0",
        -1: "expected more than 0",
        float("nan"): "expected a finite number",
        float("inf"): "expected a finite number",
        "x": "expected a number",
    }.items():
        cases.append((_with(recipe, parameters={"tall_mask_lambda": value}), f"models\\[0\\].parameters.tall_mask_lambda: {message}"))
    cases.append((_with(recipe, parameters={"tall_mask_lambda": [0.1, 0.2]}), "takes one value for the whole merge"))
    cases.append((_with(recipe, parameters={"weight": 0.5}), "weight 0.5 of model .*task-0'?: expected 1"))
    for changed, message in cases:
        with pytest.raises(RecipeError, match=message):
            compress_checkpoints(changed, tmp_path / "out")
    compress_checkpoints(_with(recipe, parameters={"weight": 1}), tmp_path / "fine")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "task-0", "task-1", "fine"}


def test_merge_sends_its_reader_to_compress() -> None:
    recipe = {"merge_method": "tall_masks", "base_model": "b", "models": [{"model": "a"}]}
    with pytest.raises(RecipeError, match="makes an archive and not a merged model; run taskloom compress"):
        load_recipe(recipe)
    with pytest.raises(RecipeError, match=r"key 'task' names a task of an archive .*; ties has none"):
        load_recipe({"merge_method": "ties", "base_model": "b", "models": [{"model": "a", "task": "x"}]})


def _changed(state: State, **changes: torch.Tensor | None) -> State:
    return {name: values for name, values in {**state, **changes}.items() if values is not None}


def test_refused_models(tmp_path: Path) -> None:
    base = base_state()
    good = tuned_state(base, 0)
    bad_bits = base["position_ids"].clone()
    bad_bits[4] = 7
    cases: list[tuple[State, str]] = [
        (_changed(good, position_ids=bad_bits), "I64 tensor 'position_ids' differs from the base's"),
        (_changed(good, position_ids=base["position_ids"].int()), "'position_ids' is I64 \\[6\\] in the base and I32 \\[6\\] here"),
        (_changed(good, position_ids=torch.zeros(6)), "'position_ids' is I64 \\[6\\] in the base and F32 \\[6\\] here"),
        (_changed(good, norm=torch.zeros(9, dtype=torch.int32)), "'norm' is F32 \\[9\\] in the base and I32"),
        (_changed(good, steps=torch.zeros(2, dtype=torch.int64)), "the base has no tensor 'steps' \\(I64\\)"),
        (_changed(good, norm=torch.zeros(8)), "'norm' is \\[9\\] there and \\[8\\] here"),
        (_changed(good, norm=None), "lacks 1 of its tensors: 'norm'"),
        (_changed(good, extra=torch.zeros(2)), "has 1 tensors more: 'extra'"),
        (_changed(good, norm=torch.full((9,), float("nan"))), "task-1': tensor 'norm' holds nan at entry 0; only finite weights"),
        (_changed(good, norm=good["norm"].clone().index_fill_(0, torch.tensor([5]), -math.inf)), "tensor 'norm' holds -inf at entry 5"),
    ]
    models = save_models(tmp_path, base, [good, good])
    before = {path.name for path in tmp_path.iterdir()}
    for vector in ("sum", "ties"):
        for state, message in cases:
            save_state(models["task-1"], state)
            with pytest.raises(CheckpointError, match=message):
                compress_checkpoints(archive_recipe(models, vector=vector), tmp_path / "out")
            assert {path.name for path in tmp_path.iterdir()} == before


def test_non_finite_bases_and_overflow_are_refused(tmp_path: Path) -> None:
    state = {"w": torch.ones(20)}
    huge = {"w": torch.full((20,), 3e38)}
    cases = [
        ({"w": torch.full((20,), math.inf)}, [state], "base': tensor 'w' holds inf at entry 0"),
        (state, [huge, huge], "the sum of the tasks' differences from the base overflows"),
        ({"w": -huge["w"]}, [huge], "overflow"),
        ({"w": torch.zeros(20, dtype=F16)}, [{"w": torch.full((20,), 6e4, dtype=F16)}] * 2, "base \\+ vector overflows"),
    ]
    for number, (base, tuned, message) in enumerate(cases):
        models = save_models(tmp_path / str(number), base, tuned)
        with pytest.raises(CheckpointError, match=message):
            compress_checkpoints(archive_recipe(models), tmp_path / "out")
        assert not (tmp_path / "out").exists()
    models = save_models(tmp_path / "2", {"w": -huge["w"]}, [huge])
    with pytest.raises(CheckpointError, match="differences from the base overflow"):
        compress_checkpoints(archive_recipe(models, vector="ties"), tmp_path / "out")


def test_ties_refuses_float64_beside_others(tmp_path: Path) -> None:
    base = {"a": torch.zeros(4), "b": torch.zeros(4, dtype=F64)}
    models = save_models(tmp_path, base, [tuned_state(base, 0)])
    with pytest.raises(RecipeError, match="vector: ties cannot rank float64 tensors together with others: 'a' and 'b'"):
        compress_checkpoints(archive_recipe(models, vector="ties"), tmp_path / "out")


def test_output_and_arguments(tmp_path: Path) -> None:
    base = base_state()
    models = save_models(tmp_path, base, [tuned_state(base, 0)])
    recipe = archive_recipe(models)
    compress_checkpoints(recipe, tmp_path / "out")
    with pytest.raises(OutputError, match="is not empty"):
        compress_checkpoints(recipe, tmp_path / "out")
    with pytest.raises(OutputError, match="is the input model"):
        compress_checkpoints(recipe, models["task-0"], overwrite=True)
    compress_checkpoints(archive_recipe(models, [0.9]), tmp_path / "out", overwrite=True)
    assert open_archive(tmp_path / "out").task("task-0").tall_mask_lambda == 0.9
    with pytest.raises(MergeError, match=r"threads: expected 0 .* got -1"):
        compress_checkpoints(recipe, tmp_path / "new", threads=-1)
    with pytest.raises(MergeError, match="shard size"):
        compress_checkpoints(recipe, tmp_path / "new", shard_size="5 apples")
    assert not (tmp_path / "new").exists()


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    base = base_state()
    models = save_models(tmp_path, base, [tuned_state(base, seed) for seed in range(2)])
    for vector in ("sum", "ties"):
        recipe = archive_recipe(models, vector=vector)
        told: list[int] = []
        compress_checkpoints(recipe, tmp_path / vector, progress=told.append)
        assert told == sorted(told)
        assert told[-1] == plan_archive(recipe).progress_total

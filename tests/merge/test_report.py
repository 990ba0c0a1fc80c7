"""The report against numpy, the figures, and the preview of a plan."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from toy_checkpoints import recipe_of, save_model, toy_tensors

from taskloom.merge import MergeError, MergeReport, merge_checkpoints
from taskloom.merge.ceiling import process_memory
from taskloom.merge.execute import execute_plan
from taskloom.merge.plan import MergePlan
from taskloom.merge.preview import preview
from taskloom.merge.report import Figures, TensorReport
from taskloom.merge.run import prepare

Models = dict[str, Path]
PNG = b"\x89PNG\r\n\x1a\n"


def _deltas(models: Models, name: str) -> list[np.ndarray[Any, Any]]:
    base, a, b = (load_file(models[key] / "model.safetensors")[name] for key in ("base", "a", "b"))
    return [a - base, b - base]


def _top(delta: np.ndarray[Any, Any], density: float) -> np.ndarray[Any, Any]:
    keep = np.zeros(delta.size, bool)
    keep[np.argsort(-np.abs(delta).ravel(), kind="stable")[: max(1, int(density * delta.size))]] = True
    return keep.reshape(delta.shape)


def _figures(tensor: TensorReport) -> Figures:
    assert tensor.figures is not None
    return tensor.figures


def test_figures_of_every_tensor_and_of_all(models: Models, tmp_path: Path) -> None:
    recipe = recipe_of(models, "ties", parameters={"density": 0.4})
    recipe["models"][1]["parameters"]["weight"] = -0.5
    report = merge_checkpoints(recipe, tmp_path / "out", seed=9)
    merged = [name for name, value in toy_tensors().items() if value.dtype == np.float32]
    assert {tensor.name for tensor in report.tensors if tensor.figures} == set(merged)
    flat: list[list[np.ndarray[Any, Any]]] = [[], []]
    kept, conflicts = np.zeros(2), 0
    for tensor in report.tensors:
        if tensor.name not in merged:
            assert (tensor.name, tensor.dtype, tensor.bytes, tensor.seconds) == ("model.position_ids", "I64", 128, 0.0)
            continue
        figures = _figures(tensor)
        deltas = _deltas(models, tensor.name)
        keeps = [_top(delta, 0.4) for delta in deltas]
        parts = [np.where(keeps[0], deltas[0], 0), -np.where(keeps[1], deltas[1], 0)]
        clash = int((parts[0] * parts[1] < 0).sum())
        assert figures.kept_density == [keep.sum() / keep.size for keep in keeps]
        assert figures.conflict_rate == clash / deltas[0].size
        np.testing.assert_allclose(figures.norms, [np.linalg.norm(delta) for delta in deltas], rtol=1e-6)
        cosine = float(np.sum(deltas[0] * deltas[1]) / np.linalg.norm(deltas[0]) / np.linalg.norm(deltas[1]))
        np.testing.assert_allclose(figures.cosines, [[1, cosine], [cosine, 1]], rtol=1e-5, atol=1e-6)
        assert tensor.bytes == deltas[0].nbytes
        assert tensor.layer == (int(tensor.name.split(".")[2]) if ".layers." in tensor.name else None)
        kept += [keep.sum() for keep in keeps]
        conflicts += clash
        for model, delta in zip(flat, deltas, strict=True):
            model.append(delta.ravel())
    a, b = (np.concatenate(model) for model in flat)
    np.testing.assert_allclose(report.total.kept_density, kept / a.size)
    assert report.total.conflict_rate == pytest.approx(conflicts / a.size)
    np.testing.assert_allclose(report.total.norms, [np.linalg.norm(a), np.linalg.norm(b)], rtol=1e-6)
    np.testing.assert_allclose(report.total.cosines[0][1], a @ b / np.linalg.norm(a) / np.linalg.norm(b), rtol=1e-5)
    total = sum(value.nbytes for value in toy_tensors().values())
    assert report.bytes_written == total
    assert report.bytes_read == 3 * total - 2 * 128
    assert (report.method, report.seed, report.base_model) == ("ties", 9, str(models["base"]))
    assert report.models == [str(models["a"]), str(models["b"])]
    assert any("position_ids" in note for note in report.notes)


def test_the_written_report_is_the_returned_one(models: Models, tmp_path: Path) -> None:
    report = merge_checkpoints(recipe_of(models), tmp_path / "out")
    assert isinstance(report, MergeReport)
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text()) == report.to_dict()
    assert report.versions["taskloom"] == "0.1.0"


def test_a_delta_of_zero_has_no_cosine(models: Models, tmp_path: Path) -> None:
    save_file(toy_tensors(0), models["a"] / "model.safetensors")
    report = merge_checkpoints(recipe_of(models), tmp_path / "out")
    assert report.total.norms[0] == 0.0
    assert report.total.cosines == [[None, None], [None, 1.0]]


def test_values_that_are_not_finite_leave_valid_json(models: Models, tmp_path: Path) -> None:
    tensors = toy_tensors(1)
    tensors["model.norm.weight"][0] = np.nan
    save_file(tensors, models["a"] / "model.safetensors")
    merge_checkpoints(recipe_of(models), tmp_path / "out", allow_nonfinite=True)
    content = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    norm = next(tensor for tensor in content["tensors"] if tensor["name"] == "model.norm.weight")
    assert norm["figures"]["norms"][0] is None
    assert norm["figures"]["cosines"] == [[None, None], [None, 1.0]]


def test_inner_products_that_overflow_both_ways_have_no_sum(tmp_path: Path) -> None:
    values = {"base": (0.0, 0.0), "a": (1e30, 1e30), "b": (1e30, -1e30)}
    models = {
        name: save_model(tmp_path / name, {key: np.full(9, value, np.float32) for key, value in zip("xy", pair, strict=True)})
        for name, pair in values.items()
    }
    report = merge_checkpoints(recipe_of(models), tmp_path / "out")
    assert report.total.norms == [None, None]
    assert report.total.cosines == [[None, None], [None, None]]


def test_slerp_reports_the_norm_of_its_delta(models: Models, tmp_path: Path) -> None:
    recipe = {"merge_method": "slerp", "base_model": str(models["base"]), "models": [{"model": str(models["a"])}], "parameters": {"t": 0.5}}
    report = merge_checkpoints(recipe, tmp_path / "out")
    for tensor in report.tensors:
        if tensor.figures:
            np.testing.assert_allclose(tensor.figures.norms, [np.linalg.norm(_deltas(models, tensor.name)[0])], rtol=1e-6)


def test_a_plain_copy_has_no_figures(models: Models, tmp_path: Path) -> None:
    recipe = {"merge_method": "passthrough", "models": [{"model": str(models["a"])}]}
    report = merge_checkpoints(recipe, tmp_path / "out")
    assert [tensor.figures for tensor in report.tensors] == [None] * len(report.tensors)
    assert report.total == Figures([], 0.0, [], [])
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > report.bytes_written


def test_cosines_of_many_models_are_estimated(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    folders = [save_model(tmp_path / "base", {"w": np.zeros((512, 256), np.float32)})]
    shared = random.normal(size=(512, 256))
    for number in range(9):
        tensor = (shared + random.normal(size=shared.shape)).astype(np.float32)
        folders.append(save_model(tmp_path / f"m{number}", {"w": tensor}))
    models = [{"model": str(folder)} for folder in folders[1:]]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(folders[0]), "models": models, "parameters": {"weight": 1}}
    cosines = np.array(merge_checkpoints(recipe, tmp_path / "out").total.cosines, float)
    assert (np.diag(cosines) == 1).all()
    np.testing.assert_allclose(cosines[~np.eye(9, dtype=bool)], 0.5, atol=0.02)


def test_magnitude_histograms_count_exponents(models: Models, tmp_path: Path) -> None:
    _, planned = prepare(recipe_of(models))
    result = execute_plan(planned.plan, tmp_path, magnitude_histogram=True)
    for tensor in result.tensors:
        assert tensor.magnitude_histogram is not None
        for counts, delta in zip(tensor.magnitude_histogram, _deltas(models, tensor.name), strict=True):
            exponents = (delta.astype(np.float32).view(np.uint32) >> 23) & 0xFF
            assert counts == np.bincount(exponents.ravel(), minlength=256).tolist()


def test_plots(models: Models, tmp_path: Path) -> None:
    merge_checkpoints(recipe_of(models, "ties", parameters={"density": 0.5}), tmp_path / "out", plot=True)
    plots = {path.name: path.read_bytes() for path in (tmp_path / "out" / "plots").iterdir()}
    assert set(plots) == {"layers.png", "cosines.png", "magnitudes.png"}
    assert all(content.startswith(PNG) and len(content) > 5000 for content in plots.values())


@pytest.mark.parametrize("method", ["slerp", "passthrough"])
def test_plots_of_merges_without_layers_or_figures(tmp_path: Path, method: str) -> None:
    folders = [save_model(tmp_path / name, {"w": np.full((4, 4), value, np.float32)}) for value, name in enumerate(("base", "a"))]
    recipe: dict[str, Any] = {"merge_method": method, "models": [{"model": str(folders[1])}]}
    if method == "slerp":
        recipe |= {"base_model": str(folders[0]), "parameters": {"t": 0.5}}
    merge_checkpoints(recipe, tmp_path / "out", plot=True)
    names = {path.name for path in (tmp_path / "out").glob("plots/*")}
    assert names == ({"cosines.png", "magnitudes.png"} if method == "slerp" else set())


def test_plots_need_matplotlib_before_anything_is_written(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else found(name))
    with pytest.raises(MergeError, match=r"taskloom\[plot\]"):
        merge_checkpoints(recipe_of(models), tmp_path / "out", plot=True)
    assert not (tmp_path / "out").exists()


def _shown(recipe: dict[str, Any], **options: Any) -> dict[str, Any]:
    loaded, planned = prepare(recipe, **options)
    return preview(planned, method=loaded.method.name, base_model=loaded.base_model, threads=2).to_dict()


def test_previews_are_what_the_merge_then_does(models: Models, tmp_path: Path) -> None:
    recipe = recipe_of(models, "ties", parameters={"density": 0.5})
    shown = _shown(recipe, shard_size=1000)
    report = merge_checkpoints(recipe, tmp_path / "out", shard_size=1000)
    assert shown["files"] == {file.name: file.bytes for file in report.files}
    assert shown["bytes_out"] == sum(shown["files"].values())
    assert shown["bytes_in"] == report.bytes_read
    merged = [value for value in toy_tensors().values() if value.dtype == np.float32]
    assert (shown["tensors_merged"], shown["tensors_copied"]) == (len(merged), 1)
    assert shown["parameters_merged"] == sum(value.size for value in merged)
    assert shown["models"] == report.models
    assert shown["threads"] == 2
    assert 0 < shown["anonymous_memory"] - process_memory() < 2**26
    assert process_memory() < shown["least_max_ram"]


def test_a_plan_without_jobs_executes(tmp_path: Path) -> None:
    result = execute_plan(MergePlan((), (), (), ()), tmp_path)
    assert (result.tensors, result.bytes_read, result.bytes_written) == ([], 0, 0)

"""The executor against the same merge in plain numpy."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from taskloom.merge import merge_checkpoints
from taskloom.merge.errors import MergeError
from taskloom.merge.execute import Executor, execute_plan
from taskloom.merge.plan import MergePlan, Stages, TensorJob, TensorSource, TensorTarget

SHAPES = {"layers.0.weight": (301, 700), "layers.1.weight": (64, 33), "norm.weight": (17,), "scalar": ()}


def _models(folder: Path, dtype: Any = np.float32) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    base = {name: np.asarray(random.standard_normal(shape), dtype=dtype) for name, shape in SHAPES.items()}
    models = [base]
    models += [{k: np.asarray(v + 0.1 * random.standard_normal(v.shape), dtype=dtype) for k, v in base.items()} for _ in range(3)]
    for number, tensors in enumerate(models):
        path = folder / f"m{number}"
        path.mkdir()
        save_file(tensors, path / "model.safetensors")
    return models


def _merge(folder: Path, method: str, threads: int = 0, **parameters: Any) -> dict[str, Any]:
    own = {key: parameters.pop(key) for key in ("weight", "density") if key in parameters}
    recipe = {
        "merge_method": method,
        "base_model": str(folder / "m0"),
        "models": [{"model": str(folder / f"m{t}"), "parameters": own} for t in (1, 2, 3)],
        "parameters": parameters,
    }
    out = folder / f"out_{method}_{threads}"
    merge_checkpoints(recipe, out, threads=threads)
    return load_file(out / "model.safetensors")


def _top(delta: np.ndarray[Any, Any], density: float) -> np.ndarray[Any, Any]:
    flat = np.abs(delta).ravel()
    keep = np.zeros(flat.size, bool)
    keep[np.argsort(-flat, kind="stable")[: max(1, int(density * flat.size))]] = True
    return np.where(keep.reshape(delta.shape), delta, np.float32(0))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_task_arithmetic_is_the_weighted_sum(tmp_path: Path, dtype: Any) -> None:
    base, *tuned = _models(tmp_path, dtype)
    merged = _merge(tmp_path, "task_arithmetic", weight=0.4)
    for name, got in merged.items():
        origin = base[name].astype(np.float64)
        expected = origin + sum(0.4 * (model[name].astype(np.float64) - origin) for model in tuned)
        assert got.dtype == dtype
        np.testing.assert_allclose(got.astype(np.float64), expected, rtol=2e-3 if dtype == np.float16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_ties_keeps_the_top_and_averages_what_agrees(tmp_path: Path, threads: int) -> None:
    base, *tuned = _models(tmp_path)
    merged = _merge(tmp_path, "ties", threads=threads, weight=1.0, density=0.2)
    for name, got in merged.items():
        deltas = [_top(model[name] - base[name], 0.2) for model in tuned]
        total = sum(deltas)
        sign = np.where(total >= 0, 1, -1)
        agree = [(delta * sign) > 0 for delta in deltas]
        count = np.maximum(sum(mask.astype(np.float32) for mask in agree), 1)
        expected = base[name] + sum(np.where(mask, delta, 0) for mask, delta in zip(agree, deltas, strict=True)) / count
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_breadcrumbs_removes_outliers_and_keeps_the_density(tmp_path: Path) -> None:
    base, *tuned = _models(tmp_path)
    merged = _merge(tmp_path, "breadcrumbs", weight=1.0, density=0.5, gamma=0.1)
    name = "layers.0.weight"
    total = 0.0
    for model in tuned:
        delta = (model[name] - base[name]).ravel()
        order = np.argsort(-np.abs(delta), kind="stable")
        kept = np.zeros_like(delta)
        top = int(0.1 * delta.size)
        ranks = order[top : top + int(0.5 * delta.size)]
        kept[ranks] = delta[ranks]
        total = total + kept
    np.testing.assert_allclose(merged[name].ravel(), base[name].ravel() + total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["dare_ties", "della", "breadcrumbs_ties", "consensus_ta", "consensus_ties"])
def test_threads_do_not_change_a_bit(tmp_path: Path, method: str) -> None:
    _models(tmp_path)
    settings = {} if method == "consensus_ta" else {"density": 0.4}
    one, two = (_merge(tmp_path, method, threads=threads, weight=1.0, **settings) for threads in (1, 2))
    for name, values in one.items():
        assert np.isfinite(values).all()
        assert values.tobytes() == two[name].tobytes()


def test_a_nan_is_refused_by_name(tmp_path: Path) -> None:
    models = _models(tmp_path)
    models[2]["norm.weight"][3] = np.nan
    save_file(models[2], tmp_path / "m2" / "model.safetensors")
    with pytest.raises(MergeError, match=r"norm\.weight.*m2.*element 3"):
        _merge(tmp_path, "task_arithmetic", weight=1.0)
    assert not (tmp_path / "out_task_arithmetic_0").exists()


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "consensus_ties"])
def test_cpu_levels_agree_to_the_bit(tmp_path: Path, method: str) -> None:
    from taskloom import _native

    _models(tmp_path)
    levels = [level for level in _native.build_info()["levels"] if level <= _native.detected_cpu_level()]
    merged = []
    try:
        for number, level in enumerate(levels):
            _native.force_cpu_level(level)
            merged.append(_merge(tmp_path, method, threads=number + 1, weight=1.0, density=0.4))
    finally:
        _native.force_cpu_level("")
    for other in merged[1:]:
        for name, values in merged[0].items():
            assert values.tobytes() == other[name].tobytes()


def test_slerp_follows_the_arc(tmp_path: Path) -> None:
    base, tuned, *_ = _models(tmp_path)
    recipe = {
        "merge_method": "slerp",
        "base_model": str(tmp_path / "m0"),
        "models": [{"model": str(tmp_path / "m0")}, {"model": str(tmp_path / "m1")}],
        "parameters": {"t": 0.3},
    }
    merge_checkpoints(recipe, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, got in merged.items():
        first, second = base[name].astype(np.float64), tuned[name].astype(np.float64)
        cosine = np.sum(first * second) / np.sqrt(np.sum(first**2) * np.sum(second**2))
        if abs(cosine) > 0.9995:
            expected = 0.7 * first + 0.3 * second
        else:
            angle = np.arccos(cosine)
            expected = (np.sin(0.7 * angle) * first + np.sin(0.3 * angle) * second) / np.sin(angle)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


# In a process of its own: the limit would hold for whatever file the test runner writes its output to as well.
_HEADER_ABOVE_THE_LIMIT = """
import os, resource, sys
from pathlib import Path
from taskloom.merge.errors import MergeError
from taskloom.merge.execute import execute_plan
from taskloom.merge.plan import MergePlan, OutputFile

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
plan = MergePlan(inputs=(), outputs=(OutputFile("model.safetensors", b" " * 8192, 8),), jobs=(), models=())
before = os.listdir("/proc/self/fd")
try:
    execute_plan(plan, Path(sys.argv[1]))
except MergeError as error:
    print(os.listdir("/proc/self/fd") == before, error)
"""


def test_a_header_that_cannot_be_written_leaves_no_file_open(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _HEADER_ABOVE_THE_LIMIT, tmp_path], capture_output=True, text=True, check=True, timeout=60)
    assert re.fullmatch(r"True cannot write .*model\.safetensors: File too large\n", done.stdout)


def test_rows_whose_ranks_do_not_fit_are_refused() -> None:
    place = TensorSource(0, 0, "BF16")
    stages = Stages(weight=(1.0,), select="rank_dropout", scope="row", density=(0.5,), epsilon=(0.1,))
    job = TensorJob("long", (2**31,), TensorTarget(0, 0, "BF16"), place, (place,), stages)
    plan = MergePlan(inputs=(), outputs=(), jobs=(job,), models=("tuned",))
    with pytest.raises(MergeError, match=r"tensor 'long': rows of more than 2147483647 entries"):
        Executor(plan, [0], [0], threads=1, magnitude_histogram=False)


def test_too_little_memory_is_a_merge_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def exhausted(*_: object) -> None:
        raise MemoryError("std::bad_alloc")

    monkeypatch.setattr("taskloom._native.MergeExecutor", exhausted)
    with pytest.raises(MergeError, match="not enough memory for the buffers of 3 threads"):
        execute_plan(MergePlan(inputs=(), outputs=(), jobs=(), models=()), tmp_path, threads=3)

"""A ceiling of memory: it holds, it changes no byte, and one too low is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ceiling_runs import Run, bf16_models, taskloom, write_recipe
from safetensors.numpy import save_file
from toy_checkpoints import recipe_of, save_sharded

from taskloom.merge import merge_checkpoints
from taskloom.merge.ceiling import process_memory
from taskloom.merge.errors import MergeError
from taskloom.merge.stages import METHODS

Arrays = list[np.ndarray[Any, Any]]

PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.5},
    "slerp": {"t": 0.4},
    "task_arithmetic": {"weight": 0.5},
    "ties": {"weight": 0.5, "density": 0.3, "rescale": "l1"},
    "dare_linear": {"weight": 0.5, "density": 0.3},
    "dare_ties": {"weight": 0.5, "density": 0.3},
    "della": {"weight": 0.5, "density": 0.5},
    "della_linear": {"weight": 0.5, "density": 0.5},
    "breadcrumbs": {"weight": 0.5, "density": 0.5, "gamma": 0.05},
    "breadcrumbs_ties": {"weight": 0.5, "density": 0.5, "gamma": 0.05},
    "passthrough": {"scale": 0.5},
    "magnitude": {"weight": 0.5, "density": 0.3},
    "consensus_ta": {},
    "consensus_ties": {"density": 0.3},
}


def least_of(recipe: Path, *options: str | Path) -> int:
    run = taskloom("merge", recipe, "--dry-run", "--json", *options)
    assert run.code == 0, run.output
    least: int = json.loads(run.output)["least_max_ram"]
    return least


def check_ceilings(folder: Path, recipe: Path, *, ceilings: tuple[int, ...] = (256_000_000,), threads: tuple[int, ...] = (1, 4)) -> None:
    """The recipe at the least ceiling and at others: within the ceiling, under a kernel's limit of just that, with the same bytes."""
    least = least_of(recipe)
    expected: bytes | None = None
    for ceiling in (0, least, *ceilings):
        for team in threads:
            out = folder / f"out_{ceiling}_{team}"
            options = ["--max-ram", str(ceiling)] if ceiling else []
            run = taskloom("merge", recipe, out, "-q", "-j", str(team), *options, limit=ceiling)
            assert run.code == 0, run.output
            assert not ceiling or 0 < run.peak <= ceiling
            print(f"{recipe.stem:<18} threads {team} ceiling {ceiling / 1e6:6.0f} MB peak {run.peak / 1e6:6.1f} MB")
            merged = (out / "model.safetensors").read_bytes()
            assert merged == (expected or merged)
            expected = merged


def _refused(run: Run, least: int, got: str) -> bool:
    return run.code == 1 and f"Error: max_ram: this merge needs at least {least // 10**6}MB, got {got}" in run.output


def test_every_method_is_tried() -> None:
    assert PARAMETERS.keys() == METHODS.keys()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    random = np.random.default_rng(0)
    base = random.standard_normal((1024, 1100), dtype=np.float32)
    values = [base, *(base + 0.01 * random.standard_normal(base.shape, dtype=np.float32) for _ in range(2))]
    return bf16_models(tmp_path_factory.mktemp("small"), values)


def _models_of(method: str, models: list[Path]) -> list[Path]:
    return models[: 2 if method in ("slerp", "passthrough") else None]


@pytest.mark.parametrize("method", ["ties", "dare_ties", "slerp"])
def test_the_least_ceiling_holds(tmp_path: Path, small: list[Path], method: str) -> None:
    recipe = write_recipe(tmp_path / f"{method}.yml", method, _models_of(method, small), PARAMETERS[method])
    check_ceilings(tmp_path, recipe, ceilings=(), threads=(2,))


def test_a_low_ceiling_is_refused_before_any_work(tmp_path: Path, small: list[Path]) -> None:
    recipe = write_recipe(tmp_path / "ties.yml", "ties", small, PARAMETERS["ties"])
    least = least_of(recipe)
    assert _refused(taskloom("merge", recipe, "--dry-run", "--max-ram", "10MB"), least, "10MB")
    assert _refused(taskloom("merge", recipe, tmp_path / "out", "--max-ram", "9.5MB"), least, "10MB")
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(MergeError, match=r"max_ram: this merge needs at least \d+MB, got 1MB"):
        merge_checkpoints(recipe, tmp_path / "out", max_ram="1MB")
    with pytest.raises(MergeError, match="max_ram: expected a size such as 5GB, 500M or 1GiB, got 'much'"):
        merge_checkpoints(recipe, tmp_path / "out", max_ram="much")


def test_what_the_process_holds_already_counts(tmp_path: Path, small: list[Path]) -> None:
    recipe = write_recipe(tmp_path / "ties.yml", "ties", small, PARAMETERS["ties"])
    before = process_memory()
    held = np.ones(50_000_000, np.uint8)
    assert process_memory() - before >= held.nbytes
    with pytest.raises(MergeError, match="max_ram: this merge needs at least"):
        merge_checkpoints(recipe, tmp_path / "out", max_ram=before + held.nbytes)


def test_fewer_threads_are_taken_where_their_buffers_do_not_fit(tmp_path: Path, small: list[Path]) -> None:
    recipe = write_recipe(tmp_path / "della.yml", "della", small, PARAMETERS["della"])
    least = least_of(recipe)
    run = taskloom("merge", recipe, tmp_path / "out", "-j", "64", "--max-ram", str(least), limit=least)
    assert run.code == 0, run.output
    assert f"of 64 threads were used, to stay within max_ram ({least // 10**6}MB)" in run.output
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert any("of 64 threads were used" in note for note in report["notes"])


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_ceiling_of_a_large_tensor_holds(tmp_path: Path, method: str) -> None:
    random = np.random.default_rng(1)
    base = random.standard_normal((6000, 4000), dtype=np.float32)
    values = [base, *(base + 0.01 * random.standard_normal(base.shape, dtype=np.float32) for _ in range(2))]
    models = bf16_models(tmp_path, values[: 2 if method in ("slerp", "passthrough") else None])
    recipe = write_recipe(tmp_path / f"{method}.yml", method, models, PARAMETERS[method])
    check_ceilings(tmp_path, recipe)


def _misleading(numel: int) -> np.ndarray[Any, Any]:
    """Values of which a sample sees only the smallest and the largest, so that all others lie between its brackets."""
    values = np.linspace(1, 2, numel, dtype=np.float32)
    runs = max(min(max(numel // 64, 1 << 13), 1 << 17), numel // 512) // 16
    stretch, state = numel // runs, 0x9E3779B97F4A7C15
    for run in range(runs):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        begin = run * stretch + (state >> 33) % (stretch - 15)
        values[begin : begin + 16] = 2.0**-10 if run % 2 else 2.0**10
    return values


HARD = {
    "equal": lambda n: np.full(n, 0.5, np.float32),
    "few": lambda n: np.random.default_rng(2).choice(np.array([0.25, 0.5, 1, 2], np.float32), n),
    "misleading": _misleading,
}


@pytest.mark.slow
@pytest.mark.parametrize("values", sorted(HARD))
@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
def test_magnitudes_that_defeat_the_sample_keep_the_ceiling(tmp_path: Path, method: str, values: str) -> None:
    numel = 24_000_000
    models = []
    for number, value in enumerate((np.zeros(numel, np.float32), HARD[values](numel), -HARD[values](numel))):
        path = tmp_path / f"m{number}"
        path.mkdir()
        save_file({"layers.0.weight": value.reshape(-1, 4000)}, path / "model.safetensors")
        models.append(path)
    recipe = write_recipe(tmp_path / f"{method}_{values}.yml", method, models, PARAMETERS[method] | {"density": 0.5})
    check_ceilings(tmp_path, recipe, ceilings=(128_000_000,))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "more"), [("della", {}), ("ties", {"scope": "row"}), ("ties", {"scope": "model"})])
def test_long_rows_keep_the_ceiling(tmp_path: Path, method: str, more: dict[str, Any]) -> None:
    random = np.random.default_rng(3)
    base = random.standard_normal((6, 1_000_000), dtype=np.float32)
    models = bf16_models(tmp_path, [base, *(base + 0.01 * random.standard_normal(base.shape, dtype=np.float32) for _ in range(2))])
    recipe = write_recipe(tmp_path / f"{method}.yml", method, models, PARAMETERS[method] | more)
    check_ceilings(tmp_path, recipe, ceilings=(512_000_000,))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ties", "dare_ties", "della"])
def test_many_tasks_and_tensors_keep_the_ceiling(tmp_path: Path, method: str) -> None:
    random = np.random.default_rng(4)
    shapes = {"embed.weight": (1500, 1000)} | {f"layers.{layer}.weight": (200, 400) for layer in range(100)}
    shapes |= {f"layers.{layer}.norm": (40,) for layer in range(100)}
    models = []
    for number in range(25):
        path = tmp_path / f"m{number}"
        path.mkdir()
        save_file({name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}, path / "model.safetensors")
        models.append(path)
    recipe = write_recipe(tmp_path / f"{method}.yml", method, models, PARAMETERS[method])
    check_ceilings(tmp_path, recipe)


def test_the_least_holds_for_sharded_models_with_configs(tmp_path: Path) -> None:
    """An index and a config are read whole; neither may take memory for what they could hold at most."""
    folders = {}
    for number, name in enumerate(("base", "a", "b")):
        tensors = {f"w.{layer}": np.full((64, 64), number + layer, np.float32) for layer in range(3)}
        folders[name] = save_sharded(
            tmp_path / name, {f"model-{layer}.safetensors": {key: tensors[key]} for layer, key in enumerate(tensors)}
        )
        (folders[name] / "config.json").write_text("{}")
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe_of(folders, "dare_ties", parameters={"density": 0.5})))
    least = least_of(tmp_path / "recipe.yml")
    run = taskloom("merge", tmp_path / "recipe.yml", tmp_path / "out", "-q", "--max-ram", str(least), limit=least)
    assert run.code == 0, run.output

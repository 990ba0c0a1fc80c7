"""What a checkpoint holds: header figures, statistics against numpy, hashes against hashlib."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from toy_checkpoints import recipe_of

from taskloom.cli.main import taskloom
from taskloom.merge import CheckpointError, MergeError, inspect_checkpoint, merge_checkpoints


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(taskloom, ["inspect", *map(str, arguments)], prog_name="taskloom")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {
        "model.layers.0.w": torch.tensor([[0.0, -0.0, 3.0], [-4.0, float("nan"), float("inf")]], dtype=torch.bfloat16),
        "model.layers.1.w": torch.arange(6, dtype=torch.float64),
        "empty": torch.zeros(0, 2),
        "scalar": torch.tensor(-2.0, dtype=torch.float16),
        "ids": torch.tensor([-1, 0, 5]),
        "small": torch.ones(4).to(torch.float8_e5m2),
        "wave": torch.tensor([3 + 4j]),
    }
    save_file(tensors, tmp_path / "m.safetensors", {"format": "pt", "made by": "a test"})
    return tmp_path / "m.safetensors"


def test_headers_alone(file: Path) -> None:
    found = inspect_checkpoint(file)
    by_name = {tensor.name: tensor for tensor in found.tensors}
    assert (found.parameters, found.bytes) == (21, sum(tensor.bytes for tensor in found.tensors))
    assert by_name["model.layers.1.w"].layer == 1
    assert by_name["scalar"].shape == []
    assert all(tensor.statistics is None and tensor.sha256 is None for tensor in found.tensors)
    assert found.by_dtype["F64"].bytes == 48
    assert {name: group.tensors for name, group in found.by_layer.items()} == {"0": 1, "1": 1, "none": 5}
    assert found.files[0].metadata == {"format": "pt", "made by": "a test"}
    assert (found.config, found.merge) == (None, None)


def test_statistics(file: Path) -> None:
    figures = {tensor.name: tensor.statistics for tensor in inspect_checkpoint(file, stats=True).tensors}
    special = figures["model.layers.0.w"]
    assert special is not None
    assert (special.norm, special.mean, special.minimum, special.maximum) == (5.0, -0.25, -4.0, 3.0)
    assert (special.zero_share, special.nonfinite) == (pytest.approx(1 / 3), 2)
    empty, ids, wave = figures["empty"], figures["ids"], figures["wave"]
    assert empty is not None
    assert (empty.norm, empty.zero_share) == (None, 0.0)
    assert ids is not None
    assert (ids.minimum, ids.maximum) == (-1, 5)
    assert wave is not None
    assert (wave.norm, wave.mean) == (5.0, None)
    assert figures["small"] is None


def test_statistics_over_many_blocks(tmp_path: Path) -> None:
    values = torch.randn(3, 40_001, generator=torch.Generator().manual_seed(0))
    save_file({"w": values}, tmp_path / "m.safetensors")
    (tensor,) = inspect_checkpoint(tmp_path / "m.safetensors", stats=True).tensors
    assert tensor.statistics is not None
    assert tensor.statistics.norm == pytest.approx(float(values.double().norm()), rel=1e-9)
    assert tensor.statistics.mean == pytest.approx(float(values.double().mean()), rel=1e-6)
    assert tensor.statistics.minimum == float(values.min())


def test_hashes(file: Path) -> None:
    found = inspect_checkpoint(file, hashes=True)
    assert found.files[0].sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    by_name = {tensor.name: tensor.sha256 for tensor in found.tensors}
    assert by_name["model.layers.1.w"] == hashlib.sha256(np.arange(6, dtype=np.float64).tobytes()).hexdigest()
    assert by_name["empty"] == hashlib.sha256(b"").hexdigest()


def test_a_merge_s_output_says_what_made_it(models: dict[str, Path], tmp_path: Path) -> None:
    merge_checkpoints(recipe_of(models, seed=4), tmp_path / "out", shard_size="1k")
    found = inspect_checkpoint(tmp_path / "out")
    assert found.merge == {
        "method": "task_arithmetic",
        "base_model": str(models["base"]),
        "models": [str(models["a"]), str(models["b"])],
        "seed": 4,
    }
    assert sum(file.tensors for file in found.files) == 10
    assert found.config is not None
    assert found.config["model_type"] == "toy"
    (tmp_path / "out" / "merge_report.json").unlink()
    alone = inspect_checkpoint(tmp_path / "out").merge
    assert alone is not None
    assert (alone["method"], alone["seed"]) == ("task_arithmetic", 4)


def test_command_line(file: Path, models: dict[str, Path]) -> None:
    plain = _run(file)
    assert plain.exit_code == 0
    assert "total     7 tensors, 21 parameters" in plain.output
    assert "  made by: a test" in plain.output
    full = json.loads(_run(file, "--json", "--stats", "--hash").output)
    assert set(full) == {"path", "parameters", "bytes", "by_dtype", "by_layer", "config", "merge", "files", "tensors"}
    assert _run(file, "--stats", "--hash", "--tensor", "model.*").output.count("model.layers") == 2
    assert "config    model_type toy" in _run(models["a"]).output
    assert _run(file, "--tensor", "none").exit_code == 1
    assert "no such file" in _run(file.parent / "none" / "x").output
    assert _run().exit_code == 2


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        inspect_checkpoint(tmp_path / "none")
    save_file({"w": torch.zeros(1)}, tmp_path / "m.safetensors")
    with pytest.raises(MergeError, match=r"no tensor matches 'v'; the names are such as 'w'"):
        inspect_checkpoint(tmp_path / "m.safetensors", tensor="v")

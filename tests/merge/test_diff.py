"""Two checkpoints compared: figures against plain numpy, mismatches, dtypes, NaN, exit statuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from toy_checkpoints import save_model, save_sharded, toy_tensors

from taskloom.cli.main import taskloom
from taskloom.merge import MergeError, arrays, diff_checkpoints
from taskloom.merge.diff import TensorDiff


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(taskloom, ["diff", *map(str, arguments)], prog_name="taskloom")


def _file(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path)
    return path


def _one(folder: Path, a: torch.Tensor, b: torch.Tensor, **options: Any) -> TensorDiff:
    (found,) = diff_checkpoints(_file(folder / "a.safetensors", {"w": a}), _file(folder / "b.safetensors", {"w": b}), **options).tensors
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(301, 700), (7,), ()])
@pytest.mark.parametrize("piece", [1 << 24, 1 << 16])
def test_figures_are_those_of_numpy(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...], piece: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(arrays, "PIECE_BYTES", piece)
    random = torch.Generator().manual_seed(0)
    b = torch.randn(shape, generator=random).to(dtype)
    changed = torch.rand(shape, generator=random) < 0.1
    a = torch.where(changed, b + 1, b).to(dtype)
    found = _one(tmp_path, a, b, threads=2)
    difference = a.double() - b.double()
    assert found.status == ("changed" if bool((a != b).any()) else "same")
    assert (found.entries, found.changed) == (a.numel(), int((a != b).sum()))
    assert found.max_abs == pytest.approx(float(difference.abs().max()), rel=1e-6)
    assert found.norm_difference == pytest.approx(float(difference.norm()), rel=1e-6)
    if found.changed:
        assert found.relative_norm == pytest.approx(float(difference.norm() / b.double().norm()), rel=1e-6)


def test_the_same_files_are_the_same_whatever_their_shards(tmp_path: Path) -> None:
    tensors = toy_tensors(1)
    names = sorted(tensors)
    shards = {f"model-0000{n}-of-00002.safetensors": {name: tensors[name] for name in names[n - 1 :: 2]} for n in (1, 2)}
    report = diff_checkpoints(save_model(tmp_path / "a", tensors), save_sharded(tmp_path / "b", shards))
    assert report.same
    assert report.totals.same == report.totals.tensors == len(tensors)
    assert (report.totals.changed_entries, report.totals.relative_norm, report.totals.max_abs) == (0, 0.0, 0.0)


def test_nan_infinity_and_signed_zero(tmp_path: Path) -> None:
    special = [0.0, float("nan"), float("inf"), float("inf"), 1.0, 2.0]
    other = [-0.0, float("nan"), float("inf"), -float("inf"), float("nan"), 2.5]
    found = _one(tmp_path, torch.tensor(special), torch.tensor(other))
    assert (found.changed, found.nonfinite, found.max_abs) == (4, 2, 0.5)
    assert found.norm_b == pytest.approx(2.5)
    assert _one(tmp_path, torch.tensor(special), torch.tensor(special)).status == "same"
    loose = _one(tmp_path, torch.tensor(special), torch.tensor(other), tolerance=0.5)
    assert loose.changed == 2
    assert _one(tmp_path, torch.tensor([1.0]), torch.tensor([1.5]), tolerance=0.5).status == "same"
    assert _one(tmp_path, torch.tensor([1.0]), torch.tensor([0.0])).relative_norm is None
    bits = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert _one(tmp_path, bits, bits.flip(0)).changed == 2


def test_other_dtypes_are_compared_by_value(tmp_path: Path) -> None:
    values = torch.tensor([1.0, -2.5, float("nan"), 0.1])
    found = _one(tmp_path, values, values.bfloat16())
    assert (found.status, found.changed, found.dtype_a, found.dtype_b) == ("dtype", 1, "F32", "BF16")
    assert found.max_abs == pytest.approx(abs(0.1 - float(torch.tensor(0.1).bfloat16())), rel=1e-4)
    ints = _one(tmp_path, torch.tensor([2**40, 3]), torch.tensor([2**40, 5], dtype=torch.int64))
    assert (ints.changed, ints.max_abs) == (1, 2.0)
    unsigned = _one(tmp_path, torch.tensor([0, 255], dtype=torch.uint8), torch.tensor([255, 255], dtype=torch.uint8))
    assert unsigned.max_abs == 255.0
    assert _one(tmp_path, torch.tensor([True, False]), torch.tensor([True, True])).changed == 1
    assert _one(tmp_path, torch.tensor([1 + 2j]), torch.tensor([1 - 2j])).max_abs == pytest.approx(4)


def test_small_floats_are_compared_by_bits(tmp_path: Path) -> None:
    a = torch.tensor([1.0, 2.0, 3.0]).to(torch.float8_e4m3fn)
    found = _one(tmp_path, a, torch.tensor([1.0, 2.0, 4.0]).to(torch.float8_e4m3fn))
    assert (found.status, found.changed, found.max_abs, found.relative_norm) == ("changed", 1, None, None)
    assert _one(tmp_path, a, a.float()).status == "dtype"


def test_mismatches_and_empty_tensors(tmp_path: Path) -> None:
    a = _file(tmp_path / "a.safetensors", {"both": torch.zeros(0, 3), "shape": torch.zeros(2, 3), "mine": torch.zeros(1)})
    b = _file(tmp_path / "b.safetensors", {"both": torch.zeros(0, 3), "shape": torch.zeros(3, 2), "yours": torch.zeros(1)})
    report = diff_checkpoints(a, b)
    assert {tensor.name: tensor.status for tensor in report.tensors} == {
        "both": "same",
        "shape": "shape",
        "mine": "only_a",
        "yours": "only_b",
    }
    assert not report.same
    assert diff_checkpoints(a, b, tensor="bo*").same
    with pytest.raises(MergeError, match="no tensor matches 'none'"):
        diff_checkpoints(a, b, tensor="none")
    with pytest.raises(MergeError, match="tolerance: expected a number >= 0, got -1"):
        diff_checkpoints(a, b, tolerance=-1)


def test_command_line(models: dict[str, Path]) -> None:
    same = _run(models["a"], models["a"])
    assert same.exit_code == 0
    assert "0 changed" in same.output
    different = _run(models["a"], models["b"], "--top", "2")
    assert different.exit_code == 1
    assert "and 7 tensors more (--top)" in different.output
    shown = json.loads(_run(models["a"], models["b"], "--json").output)
    assert set(shown) == {"a", "b", "same", "tolerance", "totals", "tensors"}
    assert shown["totals"]["tensors"] == len(shown["tensors"]) == 10
    assert {tensor["status"] for tensor in shown["tensors"]} == {"same", "changed"}
    quiet = _run(models["a"], models["b"], "-q")
    assert (quiet.exit_code, quiet.output) == (1, "")
    assert _run(models["a"], models["b"], "--tolerance", "100").exit_code == 0
    for wrong in ((models["a"],), (models["a"], models["a"].parent / "none"), (models["a"], models["b"], "--tolerance", "-1")):
        assert _run(*wrong).exit_code == 2


def test_diff_and_inspect_need_no_torch(models: dict[str, Path]) -> None:
    script = (
        "import sys\nfrom taskloom.cli.main import taskloom\n"
        f"taskloom(['inspect', {str(models['a'])!r}], standalone_mode=False)\nassert 'numpy' not in sys.modules\n"
        f"taskloom(['inspect', {str(models['a'])!r}, '--stats'], standalone_mode=False)\n"
        f"taskloom(['diff', {str(models['a'])!r}, {str(models['a'])!r}], standalone_mode=False)\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False"


def test_integers_of_every_width_by_numpy() -> None:
    for code, kind in (("I8", np.int8), ("I16", np.int16), ("U32", np.uint32), ("U64", np.uint64)):
        numbers = np.array([0, 1, 127], kind)
        assert arrays.values(numbers.view(f"u{numbers.itemsize}"), code).tolist() == [0, 1, 127]

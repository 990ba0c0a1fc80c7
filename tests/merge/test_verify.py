"""A finished merge is verified with the reference; whatever is changed in it is seen and named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from taskloom.cli.main import taskloom
from taskloom.merge import MergeError, merge_checkpoints, verify_merge
from taskloom.merge.checkpoint import open_checkpoint
from taskloom.merge.locate import Located
from taskloom.merge.stages import METHODS
from taskloom.merge.verify import VerifyReport, reader
from taskloom.merge.verify.thresholds import rank_cuts
from taskloom.reference.masked.magnitude import magnitude_bits

SHAPES: dict[str, tuple[int, ...]] = {
    "b.weight": (37, 53),
    "a.conv": (5, 3, 2, 3),
    "c.bias": (19,),
    "d.one": (1,),
    "e.scalar": (),
    "f.empty": (0, 4),
    "g.row": (1, 225),
}
MIXED = (torch.bfloat16, torch.float16, torch.float32, torch.bfloat16)
SETTINGS: dict[str, dict[str, Any]] = {
    "slerp": {"t": 0.3},
    "passthrough": {"scale": 1.3},
    "breadcrumbs": {"density": 0.8, "gamma": 0.05},
    "breadcrumbs_ties": {"density": 0.8, "gamma": 0.05},
    **{name: {"density": 0.5} for name in ("ties", "magnitude", "dare_linear", "dare_ties", "della", "della_linear")},
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("ties", {"scope": "row"}),
    ("ties", {"scope": "model", "zero_sign": "majority"}),
    ("ties", {"scope": "model", "rescale": "l1"}),
    ("ties", {"elect": "count", "zero_sign": "majority"}),
    ("magnitude", {"scope": "row", "rescale": "l1"}),
    ("breadcrumbs", {"scope": "model", "outliers_first": False}),
    ("breadcrumbs_ties", {"scope": "model", "zero_sign": "majority"}),
    ("dare_linear", {"rescale": "density"}),
    ("dare_ties", {"rescale": "none", "zero_sign": "majority"}),
    ("dare_ties", {"zero_sign": "majority"}),
    ("della", {"rescale": "density"}),
    ("consensus_ties", {"scope": "tensor"}),
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors here are far below what several threads are worth."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _save_models(folder: Path, dtypes: tuple[torch.dtype, ...] = MIXED, ties: bool = False) -> None:
    random = torch.Generator().manual_seed(1)
    base = {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}
    for number, dtype in enumerate(dtypes):
        tensors = base
        if number:
            tensors = {name: value + 0.3 * torch.randn(value.shape, generator=random) for name, value in base.items()}
        if ties:
            tensors = {name: (value * 4).round() / 4 for name, value in tensors.items()}
        path = folder / f"m{number}"
        path.mkdir(exist_ok=True)
        save_file({name: value.to(dtype) for name, value in tensors.items()} | {"ids": torch.arange(7)}, path / "model.safetensors")


def _recipe(folder: Path, method: str, settings: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
    alone = method in ("slerp", "passthrough")
    models = [
        {"model": str(folder / f"m{number}"), "parameters": {} if alone else {"weight": weight}}
        for number, weight in ((1, 0.5), (2, 1.0), (3, 0.25))[: 1 if alone else 3]
    ]
    base = {} if method in ("linear", "passthrough") else {"base_model": str(folder / "m0")}
    return {"merge_method": method, "models": models, "parameters": SETTINGS.get(method, {}) | (settings or {}), "seed": 77} | base | keys


def _merge(folder: Path, method: str, settings: dict[str, Any] | None = None, **keys: Any) -> Path:
    merge_checkpoints(_recipe(folder, method, settings, **keys), folder / "out", shard_size="2k")
    return folder / "out"


def _statuses(report: VerifyReport) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(taskloom, ["verify", *map(str, arguments)], prog_name="taskloom")


def _flip(out: Path, name: str, index: int, bit: int) -> None:
    """One bit of one entry of an output's tensor."""
    entry = open_checkpoint(Located("out", out)).tensors[name]
    place = entry.offset + index * (entry.nbytes // entry.numel) + bit // 8
    content = bytearray(entry.file.read_bytes())
    content[place] ^= 1 << bit % 8
    entry.file.write_bytes(content)


@pytest.mark.parametrize("piece", [1 << 22, 700])
@pytest.mark.parametrize(("method", "settings"), [*((name, {}) for name in METHODS), *VARIANTS])
def test_every_method_is_verified(tmp_path: Path, method: str, settings: dict[str, Any], piece: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(reader, "PIECE_ENTRIES", piece)
    _save_models(tmp_path, ties=piece == 700)
    report = verify_merge(_merge(tmp_path, method, settings), sample=1.0)
    assert report.problems == []
    assert set(_statuses(report).values()) == {"passed"}
    assert report.verified_tensors == report.of_tensors == len(SHAPES) + 1
    for tensor in report.tensors:
        assert tensor.criterion == "rounding" or tensor.differing == 0
        assert tensor.entries == torch.Size(tensor.shape).numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("method", ["ties", "dare_ties", "consensus_ties", "slerp"])
def test_dtypes(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    _save_models(tmp_path, (dtype,) * 4)
    assert verify_merge(_merge(tmp_path, method), sample=1.0).ok
    converted = merge_checkpoints(_recipe(tmp_path, method, out_dtype="bfloat16"), tmp_path / "small")
    assert verify_merge(converted.output, sample=1.0).ok


def test_methods_without_sums_over_a_tensor_are_equal_to_the_bit(tmp_path: Path) -> None:
    _save_models(tmp_path)
    rounded = set()
    for method in METHODS:
        report = merge_checkpoints(_recipe(tmp_path, method), tmp_path / method)
        if any(tensor.criterion == "rounding" for tensor in verify_merge(report.output, sample=1.0, digests=False).tensors):
            rounded.add(method)
    assert rounded == {"slerp", "dare_linear", "dare_ties", "della", "della_linear"}


@pytest.mark.parametrize(("method", "bit"), [("ties", 0), ("ties", 15), ("dare_ties", 3), ("slerp", 15), ("linear", 0)])
def test_a_flipped_bit_is_named(tmp_path: Path, method: str, bit: int) -> None:
    _save_models(tmp_path)
    out = _merge(tmp_path, method)
    expected = load_file(next(out.glob("*.safetensors")))
    _flip(out, "b.weight", 1000, bit)
    report = verify_merge(out, sample=1.0)
    assert _statuses(report)["digests"] == _statuses(report)["values"] == "failed"
    (wrong,) = [tensor for tensor in report.tensors if not tensor.ok]
    assert wrong.name == "b.weight"
    assert wrong.wrong == 1
    assert wrong.first_wrong is not None
    assert wrong.first_wrong.index == 1000
    assert any("tensor 'b.weight': 1 of 1961 entries are wrong, first at 1000" in problem for problem in report.problems)
    assert expected


def test_a_flipped_bit_of_a_copy_is_named(tmp_path: Path) -> None:
    _save_models(tmp_path)
    out = _merge(tmp_path, "ties")
    _flip(out, "ids", 2, 9)
    report = verify_merge(out, sample=1.0, digests=False)
    assert report.problems == ["values: tensor 'ids': 1 of 7 entries are wrong, first at 17: 2, expected 0"]


def test_nan_in_the_output_is_wrong(tmp_path: Path) -> None:
    _save_models(tmp_path)
    out = _merge(tmp_path, "dare_ties")
    file = open_checkpoint(Located("out", out)).tensors["c.bias"].file
    tensors = load_file(file)
    tensors["c.bias"][4] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    report = verify_merge(out, sample=1.0)
    (wrong,) = [tensor for tensor in report.tensors if not tensor.ok]
    assert (wrong.name, wrong.max_abs, wrong.first_wrong.found if wrong.first_wrong else None) == ("c.bias", None, "nan")
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("key", "value", "message"), [("seed", 78, "has the seed 78, the report 77"), ("out_dtype", "float32", "has changed")]
)
def test_another_recipe_or_seed_is_seen(tmp_path: Path, key: str, value: Any, message: str) -> None:
    _save_models(tmp_path)
    out = _merge(tmp_path, "dare_ties")
    path = out / "taskloom_recipe.yml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {key: value}, sort_keys=False))
    report = verify_merge(out, sample=1.0)
    assert any(message in problem for problem in report.problems)
    assert _statuses(report)["values" if key == "seed" else "tensors"] == "failed"


def test_swapped_and_foreign_files_are_seen(tmp_path: Path) -> None:
    _save_models(tmp_path)
    out = _merge(tmp_path, "ties")
    first, second = sorted(out.glob("*.safetensors"))[:2]
    (out / "extra.safetensors").write_bytes(first.read_bytes())
    assert any("extra.safetensors does not belong" in problem for problem in verify_merge(out).problems)
    (out / "extra.safetensors").unlink()
    first.rename(out / "x")
    second.rename(first)
    (out / "x").rename(second)
    report = verify_merge(out)
    assert _statuses(report) == {
        "files": "failed",
        "report": "passed",
        "digests": "failed",
        "inputs": "passed",
        "tensors": "skipped",
        "values": "skipped",
    }
    assert any("should be in" in problem for problem in report.problems)


def test_index_and_extra_and_missing_tensors_are_seen(tmp_path: Path) -> None:
    _save_models(tmp_path)
    merge_checkpoints(_recipe(tmp_path, "ties"), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["new"] = tensors.pop("c.bias")
    tensors["d.one"] = tensors["d.one"].float()
    save_file(tensors, file)
    (check,) = [check for check in verify_merge(tmp_path / "out").checks if check.name == "tensors"]
    assert sorted(check.problems) == [
        "tensor 'c.bias' is missing",
        "tensor 'd.one' is F32 [1], expected BF16 [1]",
        "tensor 'new' does not belong to the merge",
    ]


def test_inputs_that_changed_or_are_gone_are_named(tmp_path: Path) -> None:
    _save_models(tmp_path)
    out = _merge(tmp_path, "ties")
    path = tmp_path / "m2" / "model.safetensors"
    content = load_file(path)
    path.touch()
    touched = verify_merge(out)
    assert touched.ok
    assert str(path) in touched.notes[0]
    save_file({name: value * 2 if value.is_floating_point() else value for name, value in content.items()}, path)
    assert _statuses(verify_merge(out, sample=1.0))["values"] == "failed"
    save_file(content, path, {"other": "header"})
    assert any(f"{path} has " in problem for problem in verify_merge(out).problems)
    path.unlink()
    report = verify_merge(out)
    assert _statuses(report)["inputs"] == "failed"
    assert _statuses(report)["values"] == "skipped"
    assert any(str(path.parent) in problem for problem in report.problems)


def test_what_is_no_merge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="is not a folder"):
        verify_merge(tmp_path / "nothing")
    with pytest.raises(MergeError, match=r"holds no taskloom_recipe\.yml"):
        verify_merge(tmp_path)
    _save_models(tmp_path)
    out = _merge(tmp_path, "ties")
    with pytest.raises(MergeError, match=r"no tensor matches 'zz\*'"):
        verify_merge(out, tensor="zz*")
    with pytest.raises(MergeError, match="expected 0 < sample <= 1, got 0"):
        verify_merge(out, sample=0)
    (out / "merge_report.json").unlink()
    report = verify_merge(out)
    assert report.ok
    assert [name for name, status in _statuses(report).items() if status == "skipped"] == ["report", "digests", "inputs"]


def test_the_sample_is_seeded_and_spread(tmp_path: Path) -> None:
    _save_models(tmp_path)
    out = _merge(tmp_path, "linear")
    chosen = [[tensor.name for tensor in verify_merge(out, sample=0.01, seed=seed).tensors] for seed in (0, 0, 1, 2, 3)]
    assert chosen[0] == chosen[1]
    assert len({tuple(names) for names in chosen}) > 1
    assert all(len(names) >= 4 and "ids" in names for names in chosen)


def test_command_line(tmp_path: Path) -> None:
    _save_models(tmp_path)
    out = _merge(tmp_path, "ties")
    good = _run(out, "--all")
    assert good.exit_code == 0
    assert f"{out}: verified" in good.output
    shown = json.loads(_run(out, "--json", "--tensor", "[bc].*").output)
    assert sorted(tensor["name"] for tensor in shown["tensors"]) == ["b.weight", "c.bias"]
    assert shown["ok"] is True
    _flip(out, "b.weight", 3, 14)
    bad = _run(out, "--all")
    assert bad.exit_code == 1
    assert "b.weight" in bad.output
    assert "NOT what its recipe says" in bad.output
    quiet = _run(out, "--all", "-q")
    assert (quiet.exit_code, quiet.output) == (1, "")
    assert _run(tmp_path / "nothing").exit_code == 1
    for wrong in (("--sample", "0"), ("--sample", "some"), ("--sample", "101%"), ("--all", "--sample", "5%"), ("--seed", "-1")):
        assert _run(out, *wrong).exit_code == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_thresholds_are_those_of_a_sort(dtype: torch.dtype) -> None:
    values = (torch.randn(1003, generator=torch.Generator().manual_seed(5), dtype=dtype) * 8).round() / 8
    bits = magnitude_bits(values)
    ranks = [0, 1, 7, 500, 1002, 1003]
    (found,) = rank_cuts(lambda: [[piece] for piece in bits.split(100)], [ranks], dtype == torch.float64)
    descending = bits.sort(descending=True).values
    for rank, cut in zip(ranks[1:], found[1:], strict=True):
        assert cut.bits == descending[rank - 1]
        assert cut.equal_kept == rank - int((bits > cut.bits).sum())
    assert found[0].equal_kept == 0
    assert found[0].bits > int(descending[0])

"""taskloom extract: restored weights against numpy, and archives that are damaged."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_archives import State, archive_recipe, as_float, base_state, load_model, save_models, save_state, tuned_state

from taskloom.archive import compress_checkpoints, extract_task, open_archive
from taskloom.archive import pieces as pieces_module
from taskloom.merge import CheckpointError, MergeError, OutputError
from taskloom.merge.header import write_header

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 16 entries, so that small tensors have several."""
    for function in (pieces_module.cut_pieces, pieces_module.count_pieces):
        monkeypatch.setattr(function, "__defaults__", (16,))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    base = base_state()
    models = save_models(tmp_path, base, [tuned_state(base, seed) for seed in range(2)])
    compress_checkpoints(archive_recipe(models), tmp_path / "archive")
    return tmp_path / "archive"


def _same(restored: State, expected: State) -> None:
    assert restored.keys() == expected.keys()
    for name, values in expected.items():
        assert restored[name].dtype == values.dtype, name
        assert torch.equal(restored[name], values), name


def _numpy_restored(stored: State, task: str, name: str, dtype: torch.dtype) -> torch.Tensor:
    base, vector = as_float(stored[f"base/{name}"]), stored[f"vector/{name}"].numpy()
    bits = np.unpackbits(stored[f"mask/{task}/{name}"].numpy(), bitorder="little")[: base.size].reshape(base.shape)
    # What the format says, in the vector's dtype: the base plus the bit times the vector.
    return torch.from_numpy(np.asarray(base.astype(vector.dtype) + bits.astype(vector.dtype) * vector)).to(dtype)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("vector", ["sum", "ties"])
@pytest.mark.parametrize("base_dtype", [F32, BF16, F16])
def test_restored_weights_are_the_formula_s(tmp_path: Path, base_dtype: torch.dtype, vector: str) -> None:
    base = base_state(base_dtype)
    tuned = [tuned_state(base, 0), tuned_state(base, 1, F32), tuned_state(base, 2, BF16)]
    compress_checkpoints(archive_recipe(save_models(tmp_path, base, tuned), vector=vector), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "tall_masks.safetensors")
    for number, state in enumerate(tuned):
        task = f"task-{number}"
        extract_task(tmp_path / "out", task, tmp_path / "restored" / task, threads=3)
        expected = {
            name: _numpy_restored(stored, task, name, values.dtype) if values.is_floating_point() else base[name]
            for name, values in state.items()
        }
        restored = load_model(tmp_path / "restored" / task)
        _same(restored, expected)
        _same(open_archive(tmp_path / "out").state_dict(task), expected)


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_one_task_comes_back_whole(tmp_path: Path, dtype: torch.dtype) -> None:
    base = base_state(dtype)
    tuned = tuned_state(base, 0, share=0.5)
    report = compress_checkpoints(archive_recipe(save_models(tmp_path, base, [tuned])), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "tall_masks.safetensors")
    restored = open_archive(tmp_path / "out").state_dict("task-0")
    for name, values in tuned.items():
        if not values.is_floating_point():
            assert torch.equal(restored[name], values)
            continue
        moved = np.unpackbits(stored[f"mask/task-0/{name}"].numpy(), bitorder="little")[: values.numel()]
        assert np.array_equal(moved, (stored[f"vector/{name}"] != 0).reshape(-1).numpy())
        origin, own, back = base[name].double(), values.double(), restored[name].double()
        # W0 + (W1 - W0) rounds twice, each time by at most half a unit of the larger of the two.
        unit = torch.finfo(dtype).eps * torch.maximum(origin.abs(), own.abs())
        assert bool(((back - own).abs() <= unit).all()), name
        exact = (own - origin) + origin == own
        if dtype == BF16:
            assert torch.equal(back[exact], own[exact])
    error = report.tasks[0].relative_error
    assert error is not None
    assert error < {F32: 1e-5, BF16: 1e-2, F64: 1e-14}[dtype]


def test_tasks_that_move_other_entries_come_back_whole(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    base = {name: values for name, values in base_state().items() if values.is_floating_point()}
    owners = {name: torch.randint(0, 9, values.shape, generator=generator) for name, values in base.items()}
    tuned = []
    for number in range(9):
        moved = tuned_state(base, number)
        tuned.append({name: torch.where(owners[name] == number, moved[name], values) for name, values in base.items()})
    for threshold in (0.2, 5.0):
        out = tmp_path / f"out-{threshold}"
        compress_checkpoints(archive_recipe(save_models(tmp_path, base, tuned), [threshold] * 9), out)
        opened = open_archive(out)
        for number, state in enumerate(tuned):
            restored = opened.state_dict(f"task-{number}")
            for name, values in state.items():
                torch.testing.assert_close(restored[name], values, rtol=1e-6, atol=1e-7)
                untouched = state[name] == base[name]
                assert torch.equal(restored[name][untouched], base[name][untouched])


def test_checkpoint_folder(tmp_path: Path, archive: Path) -> None:
    report = extract_task(archive, "task-1", tmp_path / "restored")
    assert {path.name for path in (tmp_path / "restored").iterdir()} == {"model.safetensors", "config.json", "tokenizer.json"}
    assert json.loads((tmp_path / "restored" / "config.json").read_text())["torch_dtype"] == "float32"
    assert (report.task, report.tensors, report.copied) == ("task-1", 5, 1)
    assert report.files == [{"name": "model.safetensors", "bytes": (tmp_path / "restored" / "model.safetensors").stat().st_size}]
    extract_task(archive, "task-1", tmp_path / "bare", copy_tokenizer=False)
    assert not (tmp_path / "bare" / "tokenizer.json").exists()


def test_a_task_in_another_dtype_says_so_in_its_config(tmp_path: Path) -> None:
    base = base_state(BF16)
    compress_checkpoints(archive_recipe(save_models(tmp_path, base, [tuned_state(base, 0, F16)])), tmp_path / "archive")
    extract_task(tmp_path / "archive", "task-0", tmp_path / "restored")
    assert json.loads((tmp_path / "restored" / "config.json").read_text())["torch_dtype"] == "float16"


def test_default_place(archive: Path) -> None:
    report = extract_task(archive, "task-0")
    assert report.output == str(archive.with_name("archive-task-0").resolve())
    assert load_model(archive.with_name("archive-task-0"))
    with pytest.raises(OutputError, match="is not empty"):
        extract_task(archive, "task-0")
    extract_task(archive, "task-0", overwrite=True)


def test_shards(tmp_path: Path, archive: Path) -> None:
    extract_task(archive, "task-0", tmp_path / "whole")
    extract_task(archive, "task-0", tmp_path / "parts", shard_size=120)
    weight_map = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())["weight_map"]
    parts: State = {}
    for file in set(weight_map.values()):
        parts |= load_file(tmp_path / "parts" / file)
    assert len(set(weight_map.values())) > 2
    _same(parts, load_model(tmp_path / "whole"))


def test_a_sharded_archive_and_a_single_file(tmp_path: Path, archive: Path) -> None:
    recipe = archive_recipe({name: tmp_path / name for name in ("base", "task-0", "task-1")})
    compress_checkpoints(recipe, tmp_path / "sharded", shard_size=100)
    expected = open_archive(archive).state_dict("task-1")
    _same(open_archive(tmp_path / "sharded").state_dict("task-1"), expected)
    _same(open_archive(archive / "tall_masks.safetensors").state_dict("task-1"), expected)


def test_a_restored_task_can_be_compressed_again(tmp_path: Path, archive: Path) -> None:
    models = {"base": tmp_path / "base"}
    for task in open_archive(archive).tasks:
        extract_task(archive, task, tmp_path / "restored" / task)
        models[task] = tmp_path / "restored" / task
    compress_checkpoints(archive_recipe(models), tmp_path / "again")
    assert open_archive(tmp_path / "again").tasks == ("task-0", "task-1")


def test_unknown_tasks_and_arguments(tmp_path: Path, archive: Path) -> None:
    with pytest.raises(CheckpointError, match="has no task 'task-3'; its tasks are task-0, task-1; did you mean 'task-"):
        extract_task(archive, "task-3", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"has no task 'x'; its tasks are task-0, task-1$"):
        open_archive(archive).state_dict("x")
    with pytest.raises(MergeError, match="threads: expected 0"):
        extract_task(archive, "task-0", tmp_path / "out", threads=-2)
    with pytest.raises(OutputError, match="lies inside the input model"):
        extract_task(archive, "task-0", archive / "out")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        extract_task(tmp_path / "nowhere", "task-0", tmp_path / "out")
    with pytest.raises(CheckpointError, match="is no TALL-mask archive"):
        extract_task(tmp_path / "base", "task-0", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _stored(archive: Path) -> tuple[State, dict[str, str]]:
    file = archive / "tall_masks.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return load_file(file), json.loads(raw[8 : 8 + length])["__metadata__"]


Damage = Callable[[State, dict[str, str]], None]


def _drop(name: str) -> Damage:
    def damage(tensors: State, _metadata: dict[str, str]) -> None:
        del tensors[name]

    return damage


def _set(name: str, values: torch.Tensor) -> Damage:
    return lambda tensors, _metadata: tensors.update({name: values})


def _meta(**changes: str | None) -> Damage:
    def damage(_tensors: State, metadata: dict[str, str]) -> None:
        for key, value in changes.items():
            if value is None:
                del metadata[key]
            else:
                metadata[key] = value

    return damage


def _task(**changes: object) -> str:
    plain = {"name": "task-0", "model": "m", "tall_mask_lambda": 0.4, "dtypes": {}}
    return json.dumps([{**plain, **changes}, {**plain, "name": "task-1"}])


DAMAGES: list[tuple[Damage, str]] = [
    (_drop("mask/task-1/norm"), "tensor 'mask/task-1/norm' is missing"),
    (_drop("base/norm"), "tensor 'base/norm' is missing; 'vector/norm' belongs to it"),
    (_drop("vector/norm"), "tensor 'mask/task-0/norm' belongs to no task or vector"),
    (_set("mask/task-0/norm", torch.zeros(1, dtype=torch.uint8)), r"'mask/task-0/norm' is U8 \[1\], expected U8 \[2\] for the 9 entries"),
    (_set("mask/task-0/norm", torch.zeros(2, dtype=torch.int8)), r"is I8 \[2\], expected U8 \[2\]"),
    (_set("vector/norm", torch.zeros(8)), r"'vector/norm' is F32 \[8\], expected F32 or F64 \[9\]"),
    (_set("vector/norm", torch.zeros(9, dtype=BF16)), "'vector/norm' is BF16"),
    (_set("base/norm", torch.zeros(9, dtype=torch.int32)), "'base/norm' is I32, expected one of F32"),
    (_set("stray", torch.zeros(1)), "tensor 'stray' belongs to no part of an archive"),
    (_set("mask/task-9/norm", torch.zeros(2, dtype=torch.uint8)), "'mask/task-9/norm' belongs to no task"),
    (_set("mask/task-0/norm", torch.full((2,), 255, dtype=torch.uint8)), "mask of tensor 'norm' is damaged: bits after its last entry"),
    (_set("vector/norm", torch.full((9,), float("nan"))), "tensor 'norm' is restored with NaN or infinity"),
    (_meta(taskloom_archive=None), "is no TALL-mask archive"),
    (_meta(taskloom_archive="other"), "is no TALL-mask archive"),
    (_meta(taskloom_archive_version="2"), "is an archive of version 2, this taskloom reads version 1"),
    (_meta(taskloom_archive_version="x"), "taskloom_archive_version: expected a whole number, got 'x'"),
    (_meta(tasks=None), "damaged metadata: tasks is missing"),
    (_meta(tasks="{"), "damaged metadata: "),
    (_meta(tasks="[1]"), "damaged metadata: "),
    (_meta(tasks="[]"), "damaged metadata: tasks: expected at least one"),
    (_meta(tasks=_task(name="task-1")), "damaged metadata: tasks: expected at least one, each with a name of its own"),
    (_meta(tasks=_task(name="a/b")), "damaged metadata: 'a/b' is no task name"),
    (_meta(tasks=_task(tall_mask_lambda=0)), "tall_mask_lambda of task 'task-0': expected a finite number > 0, got 0"),
    (_meta(tasks=_task(tall_mask_lambda=float("inf"))), "expected a finite number > 0, got inf"),
    (_meta(tasks=_task(dtypes={"norm": "I8"})), "dtypes of task 'task-0': expected one of"),
    (_meta(tasks=_task(dtypes={"nothing": "F32"})), "dtypes of task 'task-0' names 'nothing', which has no mask"),
    (_meta(parameters="7"), r"its metadata says 5 \(7\)"),
    (_meta(tensors="many"), "damaged metadata: "),
]


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_damaged_archives(tmp_path: Path, archive: Path, number: int) -> None:
    damage, message = DAMAGES[number]
    tensors, metadata = _stored(archive)
    damage(tensors, metadata)
    save_file(tensors, archive / "tall_masks.safetensors", metadata=metadata)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=message):
        extract_task(archive, "task-0", tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_whole_tensor_that_is_gone_is_noticed(tmp_path: Path, archive: Path) -> None:
    tensors, metadata = _stored(archive)
    kept = {name: values for name, values in tensors.items() if not name.endswith("/norm")}
    save_file(kept, archive / "tall_masks.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=r"holds 4 tensors with masks .* its metadata says 5"):
        open_archive(archive)


def test_truncated_and_mixed_archives(tmp_path: Path, archive: Path) -> None:
    file = archive / "tall_masks.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        open_archive(archive)
    models = {name: tmp_path / name for name in ("base", "task-0", "task-1")}
    compress_checkpoints(archive_recipe(models), tmp_path / "a", shard_size=100)
    compress_checkpoints(archive_recipe(models, [0.9, 0.9]), tmp_path / "b", shard_size=100)
    last = sorted((tmp_path / "a").glob("*.safetensors"))[-1]
    shutil.copyfile(tmp_path / "b" / last.name, last)
    with pytest.raises(CheckpointError, match=r"its metadata is not that of tall_masks-00001.*different archives"):
        open_archive(tmp_path / "a")


def test_other_dtypes_are_copied(tmp_path: Path) -> None:
    base = {"w": torch.randn(5), "f8": torch.randn(4).to(torch.float8_e4m3fn), "flag": torch.tensor([True, False]), "byte": torch.zeros(3)}
    base["byte"] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    tuned = {**base, "w": base["w"] + 1}
    compress_checkpoints(archive_recipe(save_models(tmp_path, base, [tuned])), tmp_path / "archive")
    extract_task(tmp_path / "archive", "task-0", tmp_path / "restored")
    for restored in (load_model(tmp_path / "restored"), open_archive(tmp_path / "archive").state_dict("task-0")):
        assert all(torch.equal(restored[name].view(torch.uint8), base[name].view(torch.uint8)) for name in ("f8", "flag", "byte"))


def test_unaligned_files(tmp_path: Path) -> None:
    """Headers of other writers need not end at a multiple of the elements' size."""
    state = {"w": torch.randn(37)}
    header, _, _ = write_header([("w", "F32", (37,))])
    (length,) = struct.unpack("<Q", header[:8])
    for name, values in (("base", state["w"]), ("task-0", state["w"] + 1)):
        (tmp_path / name).mkdir()
        odd = struct.pack("<Q", length + 1) + header[8:] + b" "
        (tmp_path / name / "model.safetensors").write_bytes(odd + values.numpy().tobytes())
    compress_checkpoints(archive_recipe({name: tmp_path / name for name in ("base", "task-0")}), tmp_path / "archive")
    torch.testing.assert_close(open_archive(tmp_path / "archive").state_dict("task-0")["w"], state["w"] + 1, rtol=1e-6, atol=1e-6)


def test_inputs_that_shrink_are_an_error(tmp_path: Path) -> None:
    from taskloom.archive.compress import run_compression
    from taskloom.archive.planned import plan_archive

    base = base_state()
    models = save_models(tmp_path, base, [tuned_state(base, 0)])
    planned = plan_archive(archive_recipe(models))
    file = models["task-0"] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match=r"model.safetensors: changed while it was read"):
        run_compression(planned, tmp_path / "out")
    save_state(models["task-0"], tuned_state(base, 1))
    with pytest.raises(CheckpointError, match=r"model.safetensors: changed while it was read"):
        run_compression(planned, tmp_path / "out")
    assert not (tmp_path / "out").exists()

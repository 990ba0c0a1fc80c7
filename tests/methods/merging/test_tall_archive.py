"""The archive in memory: the way to and from the files of ``taskloom compress``, sizes, and what is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tall_states import State, Toy, floats, make_models, same, toy_models
from torch import nn

from taskloom import TaskVector
from taskloom.archive import compress_checkpoints, extract_task, open_archive
from taskloom.merge import CheckpointError, OutputError
from taskloom.merge.header import read_metadata
from taskloom.methods.merging.tall_masks import PackedMask, TallArchive, multi_task_vector, restore_task, tall_masks

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LAMBDAS = {"task-0": 0.2, "task-1": 0.4, "task-2": 1.0}


def _state(module: nn.Module) -> State:
    return {name: values.clone() for name, values in module.state_dict().items() if not name.startswith("head")}


@pytest.mark.parametrize("method", ["sum", "ties"])
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_restores_what_the_functions_restore(method: Any, dtype: torch.dtype) -> None:
    base, tuned = make_models(3, dtype)
    archive = TallArchive.build(base, tuned, method=method, tall_mask_lambda=LAMBDAS)
    tau = multi_task_vector(base, tuned, method)
    masks = tall_masks(base, tuned, tau, LAMBDAS)
    assert archive.tasks == ("task-0", "task-1", "task-2")
    assert same(dict(archive.vector), tau)
    assert dict(archive.masks) == masks
    for task, mask in masks.items():
        assert same(archive.state_dict(task), restore_task(base, tau, mask))


def test_a_task_has_its_own_dtype() -> None:
    base, tuned = make_models(2, BF16)
    tuned["task-1"] = {name: values.to(F16) if values.is_floating_point() else values for name, values in tuned["task-1"].items()}
    archive = TallArchive.build(base, tuned)
    assert {values.dtype for values in archive.state_dict("task-1").values()} == {F16, torch.int64}
    assert {values.dtype for values in archive.state_dict("task-0").values()} == {BF16, torch.int64}
    vectors = {task: TaskVector(base, state) for task, state in tuned.items()}
    assert {values.dtype for values in TallArchive.build(base, vectors).state_dict("task-1").values()} == {BF16, torch.int64}
    assert TallArchive.build(base, vectors).masks == archive.masks


def test_lambda_is_picked_by_validation() -> None:
    base, tuned = make_models(3)
    archive = TallArchive.build(base, tuned, evaluate=lambda task, state: 0.0, grid=(0.5, 0.3))
    assert [task.tall_mask_lambda for task in archive.info.tasks] == [0.3] * 3
    assert archive.masks == TallArchive.build(base, tuned, tall_mask_lambda=0.3).masks
    assert TallArchive.build(base, tuned).masks == TallArchive.build(base, tuned, tall_mask_lambda=0.4).masks


def test_the_archive_owns_its_memory() -> None:
    module = Toy()
    base, tuned = _state(module), {}
    for number in range(2):
        tuned[f"task-{number}"] = {
            name: values + (0.1 * number + 0.1 if values.is_floating_point() else 0) for name, values in base.items()
        }
    live = {name: values for name, values in module.state_dict().items() if not name.startswith("head")}
    archive = TallArchive.build(live, tuned)
    archive.apply_(module, "task-0")
    assert same(dict(archive.base), base)
    archive.state_dict("task-0")["norm"].zero_()
    assert archive.state_dict("task-0")["norm"].any()


def test_archives_are_copied_and_pickled() -> None:
    base, tuned = toy_models(2)
    archive = TallArchive.build(base, tuned)
    archive.apply_(Toy(), "task-0")
    for other in (copy.deepcopy(archive), pickle.loads(pickle.dumps(archive))):
        assert same(other.state_dict("task-1"), archive.state_dict("task-1"))


def test_bad_builds() -> None:
    base, tuned = make_models(2)
    with pytest.raises(ValueError, match="finetuned: expected at least one task, got none"):
        TallArchive.build(base, {})
    with pytest.raises(ValueError, match=r"task name 'a/b' must not contain a slash"):
        TallArchive.build(base, {"a/b": tuned["task-0"]})
    numbered: Any = {1: tuned["task-0"]}
    with pytest.raises(ValueError, match="task name 1 must be text"):
        TallArchive.build(base, numbered)
    with pytest.raises(ValueError, match="tall_mask_lambda: expected none beside evaluate"):
        TallArchive.build(base, tuned, tall_mask_lambda=0.4, evaluate=lambda task, state: 1.0)
    with pytest.raises(ValueError, match="tall_mask_lambda: expected a finite number > 0, got -1"):
        TallArchive.build(base, tuned, tall_mask_lambda=-1)
    with pytest.raises(ValueError, match="tensor 'position_ids' differs from the base's"):
        TallArchive.build(base, {"a": {**tuned["task-0"], "position_ids": torch.zeros(6, dtype=torch.int64)}})


def test_bad_parts() -> None:
    base, tuned = make_models(2)
    good = TallArchive.build(base, tuned)
    masks = dict(good.masks)
    with pytest.raises(ValueError, match="masks: expected those of"):
        TallArchive(good.info, good.base, good.vector, {"task-0": masks["task-0"]})
    part = PackedMask({"norm": masks["task-0"].bits["norm"]}, {"norm": (9,)})
    with pytest.raises(ValueError, match="masks: task 'task-0': expected the vector's tensors and shapes"):
        TallArchive(good.info, good.base, good.vector, {**masks, "task-0": part})
    with pytest.raises(ValueError, match="vector: 'other': expected a tensor of the base"):
        TallArchive(good.info, good.base, {**good.vector, "other": torch.zeros(2)}, masks)
    with pytest.raises(ValueError, match="tensor 'norm' holds NaN"):
        TallArchive(good.info, good.base, {**good.vector, "norm": torch.full((9,), float("nan"))}, masks)


def _save_models(folder: Path, base: State, tuned: dict[str, State]) -> dict[str, Any]:
    for name, state in {"base": base, **tuned}.items():
        (folder / name).mkdir(parents=True)
        save_file(state, folder / name / "model.safetensors", metadata={"format": "pt"})
    models = [{"model": str(folder / task), "parameters": {"tall_mask_lambda": LAMBDAS[task]}} for task in tuned]
    return {"merge_method": "tall_masks", "base_model": str(folder / "base"), "models": models}


@pytest.mark.parametrize("method", ["sum", "ties"])
@pytest.mark.parametrize(("dtype", "last"), [(F32, F32), (BF16, F32), (F64, F64), (F32, F64)])
def test_one_format_in_both_directions(tmp_path: Path, method: Any, dtype: torch.dtype, last: torch.dtype) -> None:
    base, tuned = make_models(3, dtype)
    tuned["task-2"] = {name: values.to(last) if values.is_floating_point() else values for name, values in tuned["task-2"].items()}
    recipe = _save_models(tmp_path, base, tuned)
    settings = {"vector": "ties", "density": 0.3} if method == "ties" else {"vector": "sum"}
    compress_checkpoints({**recipe, "parameters": settings}, tmp_path / "compressed")
    built = TallArchive.build(base, tuned, method=method, trim=0.3, tall_mask_lambda=LAMBDAS)
    assert built.save(tmp_path / "saved") == tmp_path / "saved"
    ours, theirs = (load_file(tmp_path / folder / "tall_masks.safetensors") for folder in ("saved", "compressed"))
    assert same({name: ours[name] for name in sorted(ours)}, {name: theirs[name] for name in sorted(theirs)})
    first, second = (read_metadata(tmp_path / folder / "tall_masks.safetensors") for folder in ("saved", "compressed"))
    assert {key: first[key] for key in ("vector", "density", "tensors", "parameters")} == {
        key: second[key] for key in ("vector", "density", "tensors", "parameters")
    }
    loaded = TallArchive.load(tmp_path / "compressed")
    assert dict(loaded.masks) == dict(built.masks)
    assert same({name: loaded.vector[name] for name in built.vector}, dict(built.vector))
    for task in tuned:
        expected = built.state_dict(task)
        extract_task(tmp_path / "saved", task, tmp_path / f"restored-{task}")
        restored = load_file(tmp_path / f"restored-{task}" / "model.safetensors")
        for found in (
            loaded.state_dict(task),
            open_archive(tmp_path / "saved").state_dict(task),
            open_archive(tmp_path / "saved").load().state_dict(task),
            restored,
        ):
            assert same({name: found[name] for name in expected}, expected)


def test_the_recipe_in_a_saved_archive_makes_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = make_models(3)
    _save_models(tmp_path, base, tuned)
    TallArchive.build(base, tuned, method="ties", trim=0.3, tall_mask_lambda=LAMBDAS).save(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yml").write_text(open_archive(tmp_path / "saved").info.recipe)
    compress_checkpoints(tmp_path / "recipe.yml", tmp_path / "again")
    ours, theirs = (load_file(tmp_path / folder / "tall_masks.safetensors") for folder in ("saved", "again"))
    assert same({name: ours[name] for name in sorted(ours)}, {name: theirs[name] for name in sorted(theirs)})


def test_shards_and_overwriting(tmp_path: Path) -> None:
    base, tuned = make_models(2)
    archive = TallArchive.build(base, tuned)
    archive.save(tmp_path / "out", shard_size=200)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert TallArchive.load(tmp_path / "out").masks == archive.masks
    with pytest.raises(OutputError, match="is not empty"):
        archive.save(tmp_path / "out")
    archive.save(tmp_path / "out", overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tall_masks.safetensors"]
    strange = TallArchive(archive.info, {**archive.base, "c": torch.zeros(2, dtype=torch.complex128)}, archive.vector, archive.masks)
    with pytest.raises(TypeError, match=r"tensor 'c' is torch.complex128, which a safetensors file cannot hold"):
        strange.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_opened_archive_is_not_read_once_another_has_its_place(tmp_path: Path) -> None:
    base, tuned = make_models(2)
    TallArchive.build(base, tuned).save(tmp_path / "archive")
    opened = open_archive(tmp_path / "archive")
    TallArchive.build(base, {"task-0": tuned["task-1"], "task-1": tuned["task-0"]}).save(tmp_path / "archive", overwrite=True)
    for read in (lambda: opened.state_dict("task-0"), lambda: opened.masks("task-0"), opened.load):
        with pytest.raises(CheckpointError, match="another file has taken its place"):
            read()


def test_size_is_that_of_the_formula(tmp_path: Path) -> None:
    tasks = 5
    base = {"w": torch.randn(40, 8), "v": torch.randn(16)}
    tuned = {f"task-{number}": {name: values + torch.randn(values.shape) for name, values in base.items()} for number in range(tasks)}
    archive = TallArchive.build(base, tuned)
    parameters = sum(values.numel() for values in base.values())
    assert 8 * archive.nbytes == (64 + tasks) * parameters
    header = open_archive(archive.save(tmp_path / "out")).nbytes - archive.nbytes
    assert 0 < header < 4000
    assert sum(values.size for values in floats(base).values()) == archive.info.parameters == parameters


def _damage(path: Path, change: Any) -> None:
    file = path / "tall_masks.safetensors"
    tensors, metadata = load_file(file), read_metadata(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata)


def test_damaged_files(tmp_path: Path) -> None:
    base, tuned = make_models(2)
    archive = TallArchive.build(base, tuned)
    cases: list[tuple[Any, type[Exception], str]] = [
        (
            lambda stored: stored.update({"mask/task-0/norm": torch.zeros(3, dtype=torch.uint8)}),
            ValueError,
            r"expected U8 \[2\] for the 9 entries",
        ),
        (lambda stored: stored.pop("vector/norm"), ValueError, "belongs to no task or vector"),
        (
            lambda stored: stored.update({"mask/task-0/norm": torch.full((2,), 255, dtype=torch.uint8)}),
            CheckpointError,
            "mask of task 'task-0' is damaged",
        ),
        (
            lambda stored: stored.update({"vector/norm": torch.full((9,), float("inf"))}),
            CheckpointError,
            "tensor 'norm' holds NaN or infinity",
        ),
    ]
    for place, (change, error, message) in enumerate(cases):
        path = archive.save(tmp_path / str(place))
        _damage(path, change)
        with pytest.raises(error, match=message) as caught:
            TallArchive.load(path)
        assert isinstance(caught.value, CheckpointError)
    with pytest.raises(CheckpointError, match="no-such-archive"):
        TallArchive.load(tmp_path / "no-such-archive")


def test_task_vectors_that_stay_in_their_checkpoints(tmp_path: Path) -> None:
    base, tuned = make_models(3)
    _save_models(tmp_path, base, tuned)
    vectors = {task: TaskVector.from_checkpoints(tmp_path / "base", tmp_path / task) for task in tuned}
    for method in ("sum", "ties"):
        kind: Any = method
        streamed = TallArchive.build(base, vectors, method=kind)
        whole = TallArchive.build(base, tuned, method=kind)
        assert same(dict(streamed.vector), dict(whole.vector))
        assert dict(streamed.masks) == dict(whole.masks)
    still = TaskVector.from_deltas({name: torch.zeros_like(values) for name, values in base.items() if values.is_floating_point()})
    with pytest.raises(KeyError, match=r"task 'task-1': expected the base's tensors; it lacks 'embed.weight'"):
        TallArchive.build(base, {"task-0": still, "task-1": TaskVector.from_deltas({"norm": torch.zeros(9)})})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("method", ["sum", "ties"])
def test_the_same_bits_on_a_gpu(method: Any) -> None:
    base, tuned = toy_models(3)
    expected = TallArchive.build(base, tuned, method=method)
    there = {name: values.cuda() for name, values in base.items()}
    built = TallArchive.build(
        there, {task: {name: values.cuda() for name, values in state.items()} for task, state in tuned.items()}, method=method
    )
    module = Toy().cuda()
    with pytest.raises(ValueError, match="move the archive with to"):
        expected.apply_(module, "task-0")
    for archive in (built, expected.to("cuda")):
        assert same({name: values.cpu() for name, values in archive.vector.items()}, dict(expected.vector))
        for task in ("task-0", "task-1", "task-0", "task-2"):
            archive.apply_(module, task)
            assert same({name: _state(module)[name].cpu() for name in base}, expected.state_dict(task))

"""Task vectors whose values stay in files: the same as in memory, a piece at a time, and what they refuse."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy_checkpoints import save_model, save_sharded, toy_tensors

from taskloom import TaskVector
from taskloom.merge import CheckpointError, MergeError, OutputError
from taskloom.merge.task_vector import combination, products

SHAPES = {"wide": (37, 41), "row": (1, 513), "scalar": (), "empty": (0, 4), "bias": (7,)}


def _save(path: Path, seed: int, dtypes: dict[str, torch.dtype] | None = None) -> Path:
    random = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=random).to((dtypes or {}).get(name, torch.float32)) for name, shape in SHAPES.items()}
    save_file({**tensors, "ids": torch.arange(5)}, path)
    return path


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A base and two tunings, whose dtypes differ from tensor to tensor."""
    return [
        _save(tmp_path / "base.safetensors", 0, {"wide": torch.bfloat16, "row": torch.float16}),
        _save(tmp_path / "one.safetensors", 1, {"wide": torch.bfloat16, "bias": torch.float64}),
        _save(tmp_path / "two.safetensors", 2, {"wide": torch.float16, "row": torch.float16}),
    ]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(combination, "PIECE", 100)
    monkeypatch.setattr(products, "PIECE", 100)


def _pair(models: list[Path]) -> tuple[TaskVector, TaskVector]:
    return TaskVector.from_checkpoints(models[0], models[1]), TaskVector.from_checkpoints(models[0], models[2])


def _assert_same(got: TaskVector, expected: TaskVector) -> None:
    assert set(got.names) == set(expected.names)
    assert got.dtypes == expected.dtypes
    assert got.shapes == expected.shapes
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.usefixtures("small_pieces", "poisoned_memory")
def test_values_are_those_in_memory(models: list[Path], tmp_path: Path) -> None:
    one, two = _pair(models)
    base, first, second = (load_file(path) for path in models)
    in_memory = TaskVector(base, first), TaskVector(base, second)
    assert not one.in_memory
    for made, expected in ((one, in_memory[0]), (one - 0.3 * two, in_memory[0] - 0.3 * in_memory[1]), (0 * one, 0 * in_memory[0])):
        _assert_same(made, expected)
        _assert_same(made.materialize(), expected)
        assert made.materialize().in_memory
        assert made.norm() == expected.norm()
        assert made.dot(two) == expected.dot(in_memory[1])
        path = tmp_path / "saved.safetensors"
        made.save(path)
        _assert_same(TaskVector.load(path), expected)
        changed, wanted = made.apply_to(base, 0.7), expected.apply_to(base, 0.7)
        assert all(torch.equal(changed[name], wanted[name]) for name in base)
    assert one.cosine(two) == in_memory[0].cosine(in_memory[1])
    assert one.dot(in_memory[1]) == in_memory[0].dot(two)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_deltas_are_rounded_as_in_memory(models: list[Path], dtype: torch.dtype) -> None:
    _assert_same(
        TaskVector.from_checkpoints(models[0], models[1], dtype=dtype), TaskVector(load_file(models[0]), load_file(models[1]), dtype=dtype)
    )


def test_the_usual_length_of_pieces_gives_the_same(models: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = _pair(models)
    whole = {name: delta.clone() for name, delta in (one + two).items()}
    monkeypatch.setattr(combination, "PIECE", 64)
    assert all(torch.equal(delta, whole[name]) for name, delta in (one + two).items())


@pytest.mark.usefixtures("small_pieces")
def test_threads_change_nothing(models: list[Path]) -> None:
    one, two = _pair(models)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            mixed = one - 0.3 * two
            assert torch.get_num_threads() == threads
            found.append((mixed.dot(two), mixed.norm(), mixed.cosine(one), [delta.clone() for delta in mixed.values()]))
    finally:
        torch.set_num_threads(before)
    for products_and_norms in found[1:]:
        assert products_and_norms[:3] == found[0][:3]
        assert all(torch.equal(*pair) for pair in zip(products_and_norms[3], found[0][3], strict=True))


class _Largest(TorchDispatchMode):
    """The largest tensor that any op gives out."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.usefixtures("small_pieces")
def test_streaming_holds_pieces_and_reads_what_is_asked_for(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    preadv = os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        reads.append(preadv(descriptor, buffers, offset))
        return reads[-1]

    monkeypatch.setattr(os, "preadv", counted)
    # The mode sees the ops of its own thread.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    one, two = _pair(models)
    mixed = 2 * one - two
    assert reads == []
    with _Largest() as largest:
        mixed.norm()
        mixed.dot(one)
        mixed.save(tmp_path / "mixed.safetensors")
    # In bytes, which is how a piece is read: 8 a float64.
    assert largest.numel <= 800
    assert max(reads) <= 800
    reads.clear()
    assert one["bias"].shape == (7,)
    assert sum(reads) == 7 * (4 + 8)
    reads.clear()
    mixed.norm()
    # The base is read once for each of the two differences.
    floats = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}
    assert sum(reads) == sum(
        numel * {"wide": 2 * 2 + 2 + 2, "row": 2 * 2 + 4 + 2, "bias": 2 * 4 + 8 + 4}.get(name, 16) for name, numel in floats.items()
    )


def test_a_saved_vector_is_a_safetensors_file(models: list[Path], tmp_path: Path) -> None:
    one, _ = _pair(models)
    path = tmp_path / "tau.safetensors"
    one.as_regime("linear").save(path)
    assert all(torch.equal(tensor, one[name]) for name, tensor in load_file(path).items())
    loaded = TaskVector.load(path)
    assert loaded.regime == "linear"
    # Onto its own file, and from a vector in memory.
    (2 * loaded).save(path)
    with pytest.raises(CheckpointError, match="another file has taken its place"):
        loaded["wide"]
    torch.testing.assert_close(TaskVector.load(path)["wide"], 2 * one["wide"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base.safetensors", "one.safetensors", "tau.safetensors", "two.safetensors"]
    tied = torch.ones(3, dtype=torch.float16)
    TaskVector({"a": 0 * tied, "b": 0 * tied}, {"a": tied, "b": tied}, dtype=torch.float16).save(path)
    assert TaskVector.load(path).dtypes == {"a": torch.float16, "b": torch.float16}


def test_saving_fails_whole(models: list[Path], tmp_path: Path) -> None:
    one, two = _pair(models)
    path = tmp_path / "tau.safetensors"
    one.save(path)
    before = path.read_bytes()
    _save(models[2], 5)
    with pytest.raises(CheckpointError, match="changed"):
        (one + two).save(path)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match=r"expected a path that ends in \.safetensors, got '.*tau.pt'"):
        one.save(tmp_path / "tau.pt")
    with pytest.raises(OutputError, match="No such file or directory"):
        one.save(tmp_path / "nothing" / "tau.safetensors")


def test_a_file_that_changed_is_an_error(models: list[Path], tmp_path: Path) -> None:
    for change, words in (
        (lambda path: _save(path, 9), "changed while it was read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "changed while it was read"),
        (lambda path: path.unlink(), "cannot be read any more"),
    ):
        base, tuned = _save(tmp_path / "b.safetensors", 0), _save(tmp_path / "t.safetensors", 1)
        tau = TaskVector.from_checkpoints(base, tuned)
        assert tau.norm() > 0
        change(tuned)
        for use in (tau.norm, tau.materialize, lambda tau=tau: tau["wide"]):
            with pytest.raises(CheckpointError, match=words):
                use()


def test_a_file_that_changes_under_the_reader(models: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = _pair(models)
    preadv = os.preadv

    def shrinking(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        os.truncate(models[1], 1000)
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", shrinking)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        one["wide"]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_any_thread_ends_the_work(models: list[Path], monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    one, two = _pair(models)
    preadv, calls = os.preadv, iter(range(10**6))

    def failing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if next(calls) == 9:
            raise OSError(5, "Input/output error")
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(CheckpointError, match="cannot be read: Input/output error"):
            (one + two).norm()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert next(calls) < 60


def test_damaged_and_unfitting_checkpoints(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        TaskVector.from_checkpoints(models[0], tmp_path / "nothing.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(models[1].read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"broken\.safetensors"):
        TaskVector.from_checkpoints(models[0], broken)
    save_file({"wide": torch.ones(3)}, broken)
    with pytest.raises(CheckpointError, match="does not fit"):
        TaskVector.from_checkpoints(models[0], broken)
    tensors = load_file(models[1])
    tensors["bias"][5] = float("nan")
    save_file(tensors, broken)
    tau = TaskVector.from_checkpoints(models[0], broken)
    assert tau["wide"].shape == (37, 41)
    with pytest.raises(CheckpointError, match=r"tensor 'bias' holds nan at entry 5; only finite weights"):
        tau["bias"]
    tensors["bias"][5] = 1e6
    save_file(tensors, broken)
    with pytest.raises(ValueError, match=r"tensor 'bias': the difference overflows torch\.float16"):
        TaskVector.from_checkpoints(models[0], broken, dtype=torch.float16)["bias"]


def test_tensors_of_8_bits_are_left_out_with_a_warning(tmp_path: Path) -> None:
    state = {"w": torch.ones(3), "ids": torch.arange(3), "packed": torch.ones(4).to(torch.float8_e4m3fn)}
    save_file(state, tmp_path / "base.safetensors")
    with pytest.warns(UserWarning, match=r"tensors of F8_E4M3 have no delta here: 'packed'") as caught:
        tau = TaskVector.from_checkpoints(tmp_path / "base.safetensors", tmp_path / "base.safetensors")
    assert tau.names == ("w",)
    assert caught[0].filename == __file__
    with pytest.raises(TypeError, match=r"'packed' of base: expected float32.*got torch\.float8_e4m3fn"):
        TaskVector(state, state)


def _with_metadata(path: Path, **changes: str | None) -> Path:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = {key: value for key, value in {**header["__metadata__"], **changes}.items() if value is not None}
    body = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(body)) + body + content[8 + length :])
    return path


def test_what_load_refuses(models: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "tau.safetensors"
    for changes, words in (
        ({"taskloom_task_vector": None}, "its metadata has no taskloom_task_vector"),
        ({"taskloom_task_vector": "2"}, "taskloom_task_vector is '2', expected '1'"),
        ({"regime": None}, "expected 'linear' or 'nonlinear', got ''"),
        ({"regime": "quadratic"}, "got 'quadratic'"),
    ):
        TaskVector.from_checkpoints(models[0], models[1]).save(path)
        with pytest.raises(CheckpointError, match=words):
            TaskVector.load(_with_metadata(path, **changes))
    with pytest.raises(CheckpointError, match="is no task vector"):
        TaskVector.load(models[0])
    save_file({"ids": torch.ones(2, dtype=torch.int64)}, path, {"taskloom_task_vector": "1", "regime": "linear"})
    with pytest.raises(CheckpointError, match="tensor 'ids' is I64, expected one of F32, BF16, F16, F64"):
        TaskVector.load(path)
    save_file({}, path, {"taskloom_task_vector": "1", "regime": "linear"})
    with pytest.raises(CheckpointError, match="holds no tensor"):
        TaskVector.load(path)
    with pytest.raises(MergeError, match="No such file"):
        TaskVector.load(tmp_path / "nothing.safetensors")
    save_file({"w": torch.tensor([1.0, float("inf")])}, path, {"taskloom_task_vector": "1", "regime": "linear"})
    with pytest.raises(CheckpointError, match="tensor 'w' holds inf at entry 1"):
        TaskVector.load(path).norm()


def test_folders_shards_and_tied_heads(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", toy_tensors(0), {"tie_word_embeddings": True})
    tensors = toy_tensors(1)
    head = tensors.pop("lm_head.weight")
    names = sorted(tensors)
    shards = {f"model-0000{part}-of-00002.safetensors": {name: tensors[name] for name in names[part - 1 :: 2]} for part in (1, 2)}
    tuned = save_sharded(tmp_path / "tuned", shards)
    (tuned / "config.json").write_text("{}")
    tau = TaskVector.from_checkpoints(str(base), str(tuned))
    assert "model.position_ids" not in tau
    assert head.shape == tau.shapes["lm_head.weight"]
    # The embedding stands for the head that is tied to it.
    np.testing.assert_array_equal(tau["lm_head.weight"].numpy(), tensors["model.embed_tokens.weight"] - toy_tensors(0)["lm_head.weight"])


def test_a_merge_of_checkpoints_imports_no_torch(models: list[Path], tmp_path: Path) -> None:
    script = (
        "import sys, taskloom.merge\n"
        "recipe = {'merge_method': 'linear', 'models': [{'model': path, 'parameters': {'weight': 1}} for path in sys.argv[1:3]]}\n"
        "taskloom.merge.merge_checkpoints(recipe, sys.argv[3])\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, *map(str, models[:2]), str(tmp_path / "out")], check=True)

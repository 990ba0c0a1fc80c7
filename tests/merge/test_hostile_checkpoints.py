"""Model folders whose files are links, pipes, folders, or damaged JSON: a CheckpointError that names the file, at once."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from toy_checkpoints import save_model, save_sharded

from taskloom.merge.checkpoint import Checkpoint, open_checkpoint
from taskloom.merge.errors import CheckpointError
from taskloom.merge.locate import locate
from taskloom.merge.run import merge_checkpoints

ONE, TWO = {"a": np.ones(2, np.float32)}, {"b": np.ones(3, np.float32)}
INDEX = "model.safetensors.index.json"


def _open(path: Path) -> Checkpoint:
    return open_checkpoint(locate(str(path)))


def _merge(base: Path, tuned: Path, out: Path) -> None:
    recipe = {"merge_method": "task_arithmetic", "base_model": str(base), "models": [{"model": str(tuned), "parameters": {"weight": 1}}]}
    merge_checkpoints(recipe, out)


def _refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        _open(path)
    message = str(caught.value)
    assert str(path) in message
    assert len(message) < 1500
    return message


def _put(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize(("kind", "message"), [("pipe", "is a named pipe"), ("folder", "is a directory"), ("device", "is a link to /dev")])
@pytest.mark.parametrize("name", ["model.safetensors", INDEX, "one.safetensors", "config.json"])
def test_refuses_what_is_no_file(tmp_path: Path, name: str, kind: str, message: str) -> None:
    folder = tmp_path / "model"
    if name in ("model.safetensors", "config.json"):
        save_model(folder, ONE, {})
    else:
        save_sharded(folder, {"one.safetensors": ONE, "two.safetensors": TWO})
    _put(folder / name, kind)
    refusal = _refusal(folder)
    assert refusal.startswith(str(folder / name))
    assert message in refusal


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["tokenizer.json", "1_Pooling/config.json"])
def test_refuses_side_files_that_are_no_files(tmp_path: Path, name: str, kind: str) -> None:
    base, tuned = save_model(tmp_path / "base", ONE), save_model(tmp_path / "tuned", ONE)
    (base / name).parent.mkdir(exist_ok=True)
    _put(base / name, kind)
    with pytest.raises(CheckpointError) as caught:
        _merge(base, tuned, tmp_path / "out")
    assert str(caught.value).startswith(str(base / name))
    assert sorted(os.listdir(tmp_path)) == ["base", "tuned"]


def test_a_single_file_may_be_any_link_and_no_pipe(tmp_path: Path) -> None:
    save_model(tmp_path / "model", ONE)
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "model" / "model.safetensors")
    assert list(_open(tmp_path / "link.safetensors").tensors) == ["a"]
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "is a named pipe, expected a regular file" in _refusal(tmp_path / "pipe.safetensors")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    assert "is a device, expected a regular file" in _refusal(tmp_path / "zero.safetensors")


def test_links_inside_a_folder_are_followed(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", ONE, {"a": 1})
    (folder / "files").mkdir()
    for name in ("model.safetensors", "config.json"):
        (folder / name).rename(folder / "files" / name)
        (folder / name).symlink_to(f"files/{name}")
    (tmp_path / "link").symlink_to(folder)
    assert list(_open(folder).tensors) == list(_open(tmp_path / "link").tensors) == ["a"]
    assert _open(folder).config == {"a": 1}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "other.safetensors"])
@pytest.mark.parametrize("target", ["../secret/{name}", "{root}/secret/{name}", "../model-2/{name}", "hop"])
def test_links_out_of_a_folder_are_refused(tmp_path: Path, name: str, target: str) -> None:
    save_model(tmp_path / "secret", ONE, {}, file=name if name.endswith("safetensors") else "model.safetensors")
    (tmp_path / "model-2").symlink_to("secret")
    folder = save_model(tmp_path / "model", ONE, {}, file=name if name.endswith("safetensors") else "model.safetensors")
    (folder / "hop").symlink_to(f"../secret/{name}")
    (folder / name).unlink()
    (folder / name).symlink_to(target.format(root=tmp_path, name=name))
    refusal = _refusal(folder)
    assert refusal.startswith(f"{folder / name}: is a link to {tmp_path.resolve() / 'secret' / name}, outside the model's folder")
    assert "cp -rL" in refusal


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", INDEX, "one.safetensors"])
@pytest.mark.parametrize("target", ["absent", "{name}", "/absent"])
def test_links_that_lead_nowhere_are_refused(tmp_path: Path, name: str, target: str) -> None:
    folder = tmp_path / "model"
    if name in ("model.safetensors", "config.json"):
        save_model(folder, ONE, {})
    else:
        save_sharded(folder, {"one.safetensors": ONE, "two.safetensors": TWO})
    (folder / name).unlink()
    (folder / name).symlink_to(target.format(name=name))
    assert _refusal(folder).startswith(f"{folder / name}: ")


def _hub_model(cache: Path, repository: str, folder: Path) -> Path:
    """A folder whose files are links to blobs of a hub cache."""
    blobs = cache / f"models--org--{repository}" / "blobs"
    save_model(blobs, ONE, {"of": repository}, file="0a1b")
    (blobs / "config.json").rename(blobs / "2c3d")
    folder.mkdir(parents=True)
    for name, blob in (("model.safetensors", "0a1b"), ("config.json", "2c3d")):
        (folder / name).symlink_to(os.path.relpath(blobs / blob, folder))
    return folder


def test_links_to_blobs_of_the_hub_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = _hub_model(tmp_path / "cache", "one", tmp_path / "cache" / "models--org--one" / "snapshots" / ("a" * 40))
    assert _open(snapshot).config == {"of": "one"}
    elsewhere = _hub_model(tmp_path / "disk", "two", tmp_path / "disk" / "models--org--two" / "snapshots" / ("b" * 40))
    assert _open(elsewhere).config == {"of": "two"}
    copied = _hub_model(tmp_path / "cache", "three", tmp_path / "local")
    assert _open(copied).config == {"of": "three"}
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "other"))
    assert "outside the model's folder" in _refusal(copied)


def test_a_snapshot_may_not_link_into_another_models_refs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = _hub_model(tmp_path / "cache", "one", tmp_path / "cache" / "models--org--one" / "snapshots" / ("a" * 40))
    save_model(tmp_path / "cache" / "token", ONE)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "cache" / "token" / "model.safetensors")
    assert "outside the model's folder" in _refusal(snapshot)


BAD_INDEX: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "cannot be read as JSON"),
    "cut short": ('{"weight_map": {"a": "one.safetens', "cannot be read as JSON"),
    "list": ("[]", "is a JSON list, expected an object"),
    "text": ('"weight_map"', "is a JSON str, expected an object"),
    "nothing": ("{}", "expected a weight_map from tensor names to file names"),
    "null": ('{"weight_map": null}', "expected a weight_map"),
    "list of pairs": ('{"weight_map": [["a", "one.safetensors"]]}', "expected a weight_map"),
    "no tensors": ('{"weight_map": {}}', "expected a weight_map"),
    "number for a file": ('{"weight_map": {"a": 1}}', "expected a weight_map"),
    "null for a file": ('{"weight_map": {"a": null}}', "expected a weight_map"),
    "list for a file": ('{"weight_map": {"a": ["one.safetensors"]}}', "expected a weight_map"),
    "map twice": ('{"weight_map": {"a": "one.safetensors"}, "weight_map": {"a": "two.safetensors"}}', "gives weight_map twice"),
    "tensor twice": ('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "weight_map names tensor 'a' twice"),
    "not UTF-8": (b'{"weight_map": {"\xff": "one.safetensors"}}', "cannot be read as JSON"),
    "surrogate": ('{"weight_map": {"\\ud800": "one.safetensors"}}', "a string is not valid Unicode"),
    "deep": ('{"weight_map": {}, "x": ' + "[" * 200 + "]" * 200 + "}", "nested too deeply"),
    "very deep": ("[" * 1_000_000, "nested too deeply"),
    "long number": ('{"weight_map": {}, "x": ' + "9" * 1_000_000 + "}", "number out of range"),
} | {
    f"shard {name!r}": (json.dumps({"weight_map": {"a": name}}), f"shard {name!r} is not a plain file name; shards lie beside their index")
    for name in ("../one.safetensors", "/etc/passwd", "..", ".", "", "x/one.safetensors", "x\\one.safetensors", "one.safetensors\0")
}


@pytest.mark.parametrize("case", BAD_INDEX)
def test_refuses_damaged_indexes(tmp_path: Path, case: str) -> None:
    content, message = BAD_INDEX[case]
    folder = save_sharded(tmp_path / "model", {"one.safetensors": ONE, "two.safetensors": TWO})
    (folder / INDEX).write_bytes(content if isinstance(content, bytes) else content.encode())
    refusal = _refusal(folder)
    assert refusal.startswith(str(folder / INDEX))
    assert message in refusal


def test_counts_missing_shards_and_tensors(tmp_path: Path) -> None:
    folder = save_sharded(tmp_path / "model", {"one.safetensors": ONE, "two.safetensors": TWO})
    weight_map = {"a": "one.safetensors", "b": "two.safetensors", "c": "three.safetensors", "d": "four.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert _refusal(folder) == f"{folder / INDEX}: shard 'four.safetensors' is missing (2 of 4 are)"
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map | {"c": "one.safetensors", "d": "one.safetensors"}}))
    assert _refusal(folder) == f"{folder / INDEX}: tensor 'c' is not in one.safetensors (2 such in all)"


def test_names_both_shards_of_a_tensor(tmp_path: Path) -> None:
    folder = save_sharded(tmp_path / "model", {"one.safetensors": ONE, "two.safetensors": ONE | TWO})
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert _refusal(folder) == f"{folder / 'two.safetensors'}: tensor 'a' is also in one.safetensors"


BAD_CONFIG = {
    "list": ("[]", "is a JSON list"),
    "empty": ("", "cannot be read as JSON"),
    "deep": ('{"x": ' * 300 + "1" + "}" * 300, "nested too deeply"),
    "surrogate": ('{"x": "\\udc00"}', "not valid Unicode"),
    "large number": ('{"x": 1e400}', "number out of range"),
    "huge": (" " * (17 * 2**20), "is above the limit of 16777216 bytes"),
}


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_refuses_damaged_configs(tmp_path: Path, case: str) -> None:
    content, message = BAD_CONFIG[case]
    folder = save_model(tmp_path / "model", ONE)
    (folder / "config.json").write_text(content)
    refusal = _refusal(folder)
    assert refusal.startswith(str(folder / "config.json"))
    assert message in refusal


@pytest.mark.parametrize("value", [None, 1, "yes", [], {"tie_word_embeddings": True}, {"dtype": {}}, [[{}]], float("inf")])
@pytest.mark.parametrize("key", ["tie_word_embeddings", "text_config", "torch_dtype", "dtype", "model_type", "quantization_config"])
def test_configs_with_values_of_other_types(tmp_path: Path, key: str, value: Any) -> None:
    base = save_model(tmp_path / "base", {"model.embed_tokens.weight": np.zeros((2, 2), np.float32)}, {key: value})
    tuned = save_model(tmp_path / "tuned", {"model.embed_tokens.weight": np.ones((2, 2), np.float32)}, {key: value})
    _merge(base, tuned, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {key: value}


def test_names_missing_and_extra_tensors_and_both_shapes(tmp_path: Path) -> None:
    many = {f"w{number}": np.ones((2, number + 1), np.float32) for number in range(6)}
    base = save_model(tmp_path / "base", many)
    few = {name: value for name, value in many.items() if name == "w0"} | {"x": many["w1"]}
    with pytest.raises(CheckpointError) as caught:
        _merge(base, save_model(tmp_path / "few", few), tmp_path / "out")
    assert str(caught.value) == (
        f"model {str(tmp_path / 'few')!r} does not fit {str(base)!r}: it lacks 5 of its tensors: 'w1', 'w2', 'w3' and 2 more "
        "and has 1 tensors more: 'x'"
    )
    other = {name: value.T.copy() for name, value in many.items()}
    with pytest.raises(CheckpointError) as caught:
        _merge(base, save_model(tmp_path / "other", other), tmp_path / "out")
    assert "5 tensors differ: 'w0' is [2, 1] there and [1, 2] here; 'w2' is [2, 3] there and [3, 2] here" in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["base", "few", "other"]


def test_bytes_that_do_not_exist_are_not_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_000) + b"{}")
    refusal = _refusal(tmp_path)
    assert refusal == f"{path}: truncated: the header needs 100000000 bytes, the file has 2 after its length field"


def test_a_model_that_is_its_own_base_is_the_base(tmp_path: Path) -> None:
    base, tuned = save_model(tmp_path / "base", ONE), save_model(tmp_path / "tuned", {"a": np.full(2, 3, np.float32)})
    (tmp_path / "link").symlink_to("base")
    models = [{"model": str(tmp_path / "link")}, {"model": str(tuned), "parameters": {"weight": 1}}]
    merge_checkpoints({"merge_method": "task_arithmetic", "base_model": str(base), "models": models}, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["a"].tolist() == [3, 3]


@pytest.mark.parametrize(
    ("shape", "message"),
    [([1] * 65, "has 65 dimensions, more than 64"), ([1] * 100_000, "has 100000 dimensions"), ([0, 2**63], "has a size of 2**63 or more")],
)
def test_shapes_that_no_tensor_of_torch_has(tmp_path: Path, shape: list[int], message: str) -> None:
    size = 0 if 0 in shape else 4
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    with pytest.raises(CheckpointError) as caught:
        _merge(tmp_path / "base", tmp_path / "tuned", tmp_path / "out")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_sixty_four_dimensions_are_merged(tmp_path: Path) -> None:
    base, tuned = (save_model(tmp_path / name, {"w": np.full([1] * 64, fill, np.float32)}) for name, fill in (("base", 0), ("tuned", 1)))
    _merge(base, tuned, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].shape == (1,) * 64

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from toy_checkpoints import save_model, save_sharded

from taskloom.merge.checkpoint import Checkpoint, open_checkpoint
from taskloom.merge.errors import CheckpointError
from taskloom.merge.locate import locate

ONE, TWO = {"a": np.ones(2, np.float32)}, {"b": np.ones(3, np.float32)}


def _open(path: Path) -> Checkpoint:
    return open_checkpoint(locate(str(path)))


def test_opens_every_layout(tmp_path: Path) -> None:
    assert list(_open(save_model(tmp_path / "whole", ONE)).tensors) == ["a"]
    assert list(_open(save_model(tmp_path / "other", ONE, file="weights.safetensors")).tensors) == ["a"]
    assert list(_open(tmp_path / "whole" / "model.safetensors").tensors) == ["a"]
    sharded = _open(save_sharded(tmp_path / "sharded", {"model-2.safetensors": TWO, "model-1.safetensors": ONE}))
    assert list(sharded.tensors) == ["a", "b"]
    assert sharded.tensors["b"].file.name == "model-2.safetensors"


def test_opens_no_pickle(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model.bin\)"):
        _open(tmp_path)
    with pytest.raises(CheckpointError, match=r"neither a folder nor a \.safetensors file"):
        _open(tmp_path / "pytorch_model.bin")


def test_refuses_folders_without_a_clear_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file"):
        _open(tmp_path)
    save_model(tmp_path, ONE, file="one.safetensors")
    save_model(tmp_path, TWO, file="two.safetensors")
    with pytest.raises(CheckpointError, match="cannot tell which file is the model"):
        _open(tmp_path)


def test_refuses_adapters(tmp_path: Path) -> None:
    save_model(tmp_path, ONE, file="adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is an adapter"):
        _open(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../one.safetensors"}, "not a plain file name"),
        ({"a": "/etc/passwd"}, "not a plain file name"),
        ({"a": "absent.safetensors"}, "'absent.safetensors' is missing"),
        ({"a": "one.safetensors", "z": "one.safetensors"}, "'z' is not in one.safetensors"),
        ({"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}, "'b' should be in one.safetensors"),
        ({"c": "one.safetensors"}, "'a' is not listed"),
        (["a"], "expected a weight_map"),
        ({"a": 1}, "expected a weight_map"),
    ],
)
def test_refuses_indexes_that_disagree_with_shards(tmp_path: Path, weight_map: object, message: str) -> None:
    save_sharded(tmp_path, {"one.safetensors": ONE, "two.safetensors": TWO})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        _open(tmp_path)


def test_refuses_a_tensor_in_two_shards(tmp_path: Path) -> None:
    save_sharded(tmp_path, {"one.safetensors": {"first": next(iter(ONE.values())), **ONE}, "two.safetensors": TWO | ONE})
    with pytest.raises(CheckpointError, match=r"'a' (is also in|should be in)"):
        _open(tmp_path)


def test_refuses_damaged_configs(tmp_path: Path) -> None:
    save_model(tmp_path, ONE)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        _open(tmp_path)


def _hub(root: Path, repo: str, commit: str, revision: str = "main") -> Path:
    folder = root / ("models--" + repo.replace("/", "--"))
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    return save_model(folder / "snapshots" / commit, ONE)


def test_finds_hub_models_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    main = _hub(tmp_path, "org/name", "a" * 40)
    old = _hub(tmp_path, "org/name", "b" * 40, "v1")
    assert locate("org/name").path == main
    assert locate("org/name@v1").path == old
    assert locate("org/name@" + "b" * 40).path == old
    assert locate("org/name@bbbbbbb").path == old
    assert locate("org/name").pinned == "org/name@" + "a" * 40
    assert list(open_checkpoint(locate("org/name")).tensors) == ["a"]


@pytest.mark.parametrize(
    ("variable", "below"),
    [("HF_HUB_CACHE", "."), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub"), ("HOME", ".cache/huggingface/hub")],
)
def test_cache_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, below: str) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    snapshot = _hub(tmp_path / below, "org/name", "c" * 40)
    assert locate("org/name").path.resolve() == snapshot.resolve()


def test_absent_hub_models_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"taskloom\[hub\]"):
        locate("org/absent")


def test_downloads_where_the_extra_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    asked = []

    def snapshot_download(repo: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((repo, revision))
        assert not any(pattern.endswith((".bin", ".pt", ".pth", ".ckpt")) for pattern in allow_patterns)
        if repo == "org/gone":
            raise OSError("404")
        return str(save_model(tmp_path / "fetched" / ("d" * 40), ONE))

    hub = types.ModuleType("huggingface_hub")
    hub.__spec__ = importlib.machinery.ModuleSpec("huggingface_hub", None)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download, raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    found = locate("org/name@v2")
    assert (found.path.name, found.pinned, asked) == ("d" * 40, "org/name@" + "d" * 40, [("org/name", "v2")])
    with pytest.raises(CheckpointError, match="model 'org/gone': cannot be downloaded: 404"):
        locate("org/gone")


def test_paths_from_the_recipes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "recipes" / "base", ONE)
    monkeypatch.chdir(tmp_path)
    assert locate("base", tmp_path / "recipes").path == tmp_path / "recipes" / "base"
    save_model(tmp_path / "base", ONE)
    assert locate("base", tmp_path / "recipes").path == Path("base")
    for absent in ("./absent", "/absent/model", "absent/model.safetensors", "a/b/c"):
        with pytest.raises(CheckpointError, match="no such file or folder"):
            locate(absent, tmp_path / "recipes")
    with pytest.raises(CheckpointError, match="adapters"):
        locate("org/base+org/adapter")

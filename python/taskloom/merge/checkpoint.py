"""Opens a checkpoint: which safetensors files make it up, and which tensors they hold. No weights are read and no pickle is opened."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taskloom.merge.errors import CheckpointError
from taskloom.merge.header import TensorEntry, read_header
from taskloom.merge.identity import FileIdentity
from taskloom.merge.locate import Located

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A located model with its tensors in file order, and its config.json where it has one."""

    located: Located
    tensors: dict[str, TensorEntry]
    config: dict[str, Any] | None = field(default=None)

    @property
    def label(self) -> str:
        return self.located.label

    @property
    def files(self) -> tuple[FileIdentity, ...]:
        """The files that hold its tensors, as they were when it was opened."""
        return tuple({entry.file: entry.identity for entry in self.tensors.values() if entry.identity is not None}.values())

    @property
    def folder(self) -> Path | None:
        """The model's folder; None when the model is a single file."""
        return self.located.path if self.located.path.is_dir() else None


def _no_weights(folder: Path) -> CheckpointError:
    if (folder / "adapter_config.json").is_file():
        return CheckpointError(f"{folder}: is an adapter, not a full checkpoint; merge it into its base first")
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{folder}: holds only pickled weights ({', '.join(pickles[:3])}), which are never opened because loading one can run code; "
            "convert the model to safetensors first (save_pretrained(..., safe_serialization=True))"
        )
    return CheckpointError(f"{folder}: holds no .safetensors file")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error


def _read_sharded(index: Path) -> dict[str, TensorEntry]:
    content = _read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: expected a weight_map from tensor names to file names")
    tensors: dict[str, TensorEntry] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or "\\" in shard or shard in ("", ".", ".."):
            raise CheckpointError(f"{index}: shard {shard!r} is not a plain file name")
        path = index.parent / shard
        if not path.is_file():
            raise CheckpointError(f"{index}: shard {shard!r} is missing")
        for name, entry in read_header(path).items():
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {name!r} is also in {tensors[name].file.name}")
            if name not in weight_map:
                raise CheckpointError(f"{path}: tensor {name!r} is not listed in {index.name}")
            if weight_map[name] != shard:
                raise CheckpointError(f"{path}: tensor {name!r} should be in {weight_map[name]} by {index.name}")
            tensors[name] = entry
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise CheckpointError(f"{index}: tensor {absent[0]!r} is not in {weight_map[absent[0]]} ({len(absent)} such in all)")
    return tensors


def _read_folder(folder: Path) -> dict[str, TensorEntry]:
    whole = folder / "model.safetensors"
    if whole.is_file():
        return read_header(whole)
    indexes = [folder / "model.safetensors.index.json"]
    if not indexes[0].is_file():
        indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        return _read_sharded(indexes[0])
    files = sorted(path for path in folder.glob("*.safetensors") if path.name != "adapter_model.safetensors")
    if len(files) == 1 and not indexes:
        return read_header(files[0])
    if not files:
        raise _no_weights(folder)
    names = ", ".join(path.name for path in (indexes or files)[:4])
    raise CheckpointError(f"{folder}: cannot tell which file is the model: {names}; name one file in the recipe")


def _read_config(path: Path) -> dict[str, Any] | None:
    file = path / "config.json"
    if not path.is_dir() or not file.is_file():
        return None
    config = _read_json(file)
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: is a JSON {type(config).__name__}, expected an object")
    return config


def open_checkpoint(located: Located) -> Checkpoint:
    """Read the headers of a model's files.

    Parameters
    ----------
    located
        A folder with ``model.safetensors``, with shards and their index, or with one other ``.safetensors`` file; or such a file.

    Raises
    ------
    CheckpointError
        If there is no safetensors file, a file or index is damaged, or shards and index disagree.
    """
    path = located.path
    if path.is_dir():
        tensors = _read_folder(path)
    elif path.suffix == ".safetensors":
        tensors = read_header(path)
    else:
        raise CheckpointError(f"model {located.label!r}: {path} is neither a folder nor a .safetensors file")
    return Checkpoint(located, tensors, _read_config(path))

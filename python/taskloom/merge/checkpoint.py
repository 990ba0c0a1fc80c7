"""Opens a checkpoint: which safetensors files make it up, and which tensors they hold. No weights are read and no pickle is opened."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taskloom.merge.errors import CheckpointError, shown
from taskloom.merge.header import TensorEntry, read_header
from taskloom.merge.identity import FileIdentity
from taskloom.merge.input_files import check_name, is_plain_name, read_regular
from taskloom.merge.links import check_link
from taskloom.merge.locate import Located
from taskloom.merge.strict_json import JsonError, check_tree, parse_json, repeated_keys

_LARGEST_INDEX = 100_000_000
_LARGEST_CONFIG = 16 * 2**20

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
    if os.path.isfile(folder / "adapter_config.json"):
        return CheckpointError(f"{folder}: is an adapter, not a full checkpoint; merge it into its base first")
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{folder}: holds only pickled weights ({', '.join(pickles[:3])}), which are never opened because loading one can run code; "
            "convert the model to safetensors first (save_pretrained(..., safe_serialization=True))"
        )
    return CheckpointError(f"{folder}: holds no .safetensors file")


def _read_json(path: Path, folder: Path, most: int) -> dict[str, Any]:
    """A JSON object from a file of a model's folder, with what no writer of ours can write down again refused."""
    check_link(path, folder)
    try:
        content = parse_json(read_regular(path, most), constants=True)
        check_tree(content)
    except JsonError as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is a JSON {type(content).__name__}, expected an object")
    return content


def _read_weight_map(index: Path) -> dict[str, str]:
    content = _read_json(index, index.parent, _LARGEST_INDEX)
    weight_map = content.get("weight_map")
    if "weight_map" in repeated_keys(content):
        raise CheckpointError(f"{index}: gives weight_map twice")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index}: expected a weight_map from tensor names to file names")
    if repeated := repeated_keys(weight_map):
        raise CheckpointError(f"{index}: weight_map names tensor {shown(repeated[0])} twice")
    return weight_map


def _shard_paths(index: Path, weight_map: dict[str, str]) -> dict[str, Path]:
    """The path of every shard that an index names; each is there, and inside the model's folder."""
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if not is_plain_name(shard):
            raise CheckpointError(f"{index}: shard {shown(shard)} is not a plain file name; shards lie beside their index")
    paths = {shard: index.parent / shard for shard in shards}
    missing = [shard for shard, path in paths.items() if not os.path.lexists(path)]
    if missing:
        others = f" ({len(missing)} of {len(shards)} are)" if len(missing) > 1 else ""
        raise CheckpointError(f"{index}: shard {shown(missing[0])} is missing{others}")
    for path in paths.values():
        check_link(path, index.parent)
    return paths


def _read_sharded(index: Path) -> dict[str, TensorEntry]:
    weight_map = _read_weight_map(index)
    tensors: dict[str, TensorEntry] = {}
    for shard, path in _shard_paths(index, weight_map).items():
        for name, entry in read_header(path).items():
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {shown(name)} is also in {tensors[name].file.name}")
            if name not in weight_map:
                raise CheckpointError(f"{path}: tensor {shown(name)} is not listed in {index.name}")
            if weight_map[name] != shard:
                raise CheckpointError(f"{path}: tensor {shown(name)} should be in {weight_map[name]} by {index.name}")
            tensors[name] = entry
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise CheckpointError(f"{index}: tensor {shown(absent[0])} is not in {weight_map[absent[0]]} ({len(absent)} such in all)")
    return tensors


def _read_file(path: Path) -> dict[str, TensorEntry]:
    check_name(path)
    check_link(path, path.parent)
    return read_header(path)


def _read_folder(folder: Path) -> dict[str, TensorEntry]:
    whole = folder / "model.safetensors"
    if os.path.lexists(whole):
        return _read_file(whole)
    indexes = [folder / "model.safetensors.index.json"]
    if not os.path.lexists(indexes[0]):
        indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        return _read_sharded(indexes[0])
    files = sorted(path for path in folder.glob("*.safetensors") if path.name != "adapter_model.safetensors")
    if len(files) == 1 and not indexes:
        return _read_file(files[0])
    if not files:
        raise _no_weights(folder)
    names = ", ".join(path.name for path in (indexes or files)[:4])
    raise CheckpointError(f"{folder}: cannot tell which file is the model: {names}; name one file in the recipe")


def _read_config(path: Path) -> dict[str, Any] | None:
    file = path / "config.json"
    if not os.path.isdir(path) or not os.path.lexists(file):
        return None
    return _read_json(file, path, _LARGEST_CONFIG)


def open_checkpoint(located: Located) -> Checkpoint:
    """Read the headers of a model's files.

    Parameters
    ----------
    located
        A folder with ``model.safetensors``, with shards and their index, or with one other ``.safetensors`` file; or such a file.

    Raises
    ------
    CheckpointError
        If there is no safetensors file, a file, index or config.json is damaged, shards and index disagree, or a link leaves the
        folder.
    """
    path = located.path
    if path.is_dir():
        tensors = _read_folder(path)
    elif path.suffix == ".safetensors":
        tensors = read_header(path)
    else:
        raise CheckpointError(f"model {shown(located.label)}: {path} is neither a folder nor a .safetensors file")
    return Checkpoint(located, tensors, _read_config(path))

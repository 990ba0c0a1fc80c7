"""Saves task vectors as safetensors files, a piece at a time, and opens them again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from taskloom.merge.errors import CheckpointError, OutputError
from taskloom.merge.header import FLOATING, read_header, read_metadata
from taskloom.merge.shards import PlannedTensor, lay_out
from taskloom.merge.task_vector.checks import Regime, check_regime
from taskloom.merge.task_vector.combination import Terms, combined_piece, each_piece
from taskloom.merge.task_vector.reading import FileSource
from taskloom.merge.task_vector.sources import Slot
from taskloom.merge.torch_dtypes import TORCH_DTYPES

_FORMAT, _VERSION, _REGIME = "taskloom_task_vector", "1", "regime"
_CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}
_ONE_FILE = 2**63


def _put(descriptor: int, offset: int, values: Tensor) -> None:
    content = values.cpu().contiguous().view(torch.uint8).numpy().data
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], offset + done)


def _write(descriptor: int, terms: Terms, slots: Mapping[str, Slot], regime: Regime) -> None:
    tensors = [PlannedTensor(name, _CODES[slot.dtype], slot.shape) for name, slot in slots.items()]
    layout = lay_out(tensors, _ONE_FILE, metadata={_FORMAT: _VERSION, _REGIME: regime})
    (file,) = layout.files
    # A disk without room says so now and not after an hour; what is not written is zero.
    os.posix_fallocate(descriptor, 0, file.size)
    os.pwrite(descriptor, file.header, 0)
    with torch.no_grad():
        for name, slot in slots.items() if terms else ():
            offset = layout.targets[name].offset

            def put(begin: int, _count: int, parts: list[Tensor], name: str = name, slot: Slot = slot, offset: int = offset) -> None:
                _put(descriptor, offset + begin * slot.dtype.itemsize, combined_piece(terms, name, slot, parts))

            each_piece(terms, name, slot.numel, put)
    os.fsync(descriptor)


def save(path: Path, terms: Terms, slots: Mapping[str, Slot], regime: Regime) -> None:
    """Write a combination's tensors to ``path``, which has either its old content or all of the new one at any time.

    Raises
    ------
    ValueError
        If the name does not end in ``.safetensors``.
    OutputError
        If it cannot be written.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"TaskVector: save: expected a path that ends in .safetensors, got {str(path)!r}")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _write(descriptor, terms, slots, regime)
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error


def load(path: Path) -> tuple[FileSource, Regime]:
    """Open a saved vector, reading its header.

    Raises
    ------
    CheckpointError
        If the file cannot be read, is damaged, or is no saved task vector.
    """
    entries = read_header(path)
    metadata = read_metadata(path)
    if metadata.get(_FORMAT) != _VERSION:
        found = f"{_FORMAT} is {metadata[_FORMAT]!r}" if _FORMAT in metadata else f"its metadata has no {_FORMAT}"
        raise CheckpointError(f"{path}: is no task vector that this version reads, as save() writes it: {found}, expected {_VERSION!r}")
    try:
        regime = check_regime(metadata.get(_REGIME, ""))
    except ValueError as error:
        raise CheckpointError(f"{path}: metadata: {error}") from error
    for name, entry in entries.items():
        if entry.dtype not in FLOATING:
            raise CheckpointError(f"{path}: tensor {name!r} is {entry.dtype}, expected one of {', '.join(FLOATING)}")
    if not entries:
        raise CheckpointError(f"{path}: holds no tensor")
    identity = next(iter(entries.values())).identity
    assert identity is not None
    identity.check_unchanged()
    return FileSource(entries, identity), regime

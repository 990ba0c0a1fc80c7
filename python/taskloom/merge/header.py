"""Reads and writes the header of a safetensors file.

Accepts exactly what safetensors 0.8 accepts, but for a tensor name given twice: safetensors keeps the last one in silence.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

from taskloom.merge.errors import CheckpointError, shown
from taskloom.merge.identity import FileIdentity
from taskloom.merge.input_files import open_regular
from taskloom.merge.strict_json import JsonError, check_tree, is_unicode, parse_json, repeated_keys

MAX_HEADER_BYTES = 100_000_000

BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

_FIELDS = ("dtype", "shape", "data_offsets")
_MOST = 2**64

FLOATING = ("F32", "BF16", "F16", "F64")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: safetensors dtype code, shape, and where its bytes are, counted from the file's start.

    ``identity`` is the file's, None for a tensor in memory.
    """

    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    identity: FileIdentity | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that ``shape`` elements of the safetensors ``dtype`` take."""
    return prod(shape) * BITS[dtype] // 8


def _read_prefix(path: Path) -> tuple[bytes, FileIdentity]:
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        size = status.st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CheckpointError(f"{path}: not a safetensors file: {size} bytes, expected at least 8")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: not a safetensors file: header length {length} is above the limit of {MAX_HEADER_BYTES} bytes")
        if 8 + length > size:
            raise CheckpointError(f"{path}: truncated: the header needs {length} bytes, the file has {size - 8} after its length field")
        raw = file.read(length)
        if len(raw) < length:
            raise CheckpointError(f"{path}: truncated while it was read")
        return raw, FileIdentity.of(path, file.fileno(), raw)


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    """The entries by name, not yet looked at; ``__metadata__`` is checked and left out."""
    try:
        header = parse_json(raw)
        if not isinstance(header, dict):
            raise CheckpointError(f"{path}: header is a JSON {type(header).__name__}, expected an object")
        repeated = repeated_keys(header)
        if "__metadata__" in repeated:
            raise CheckpointError(f"{path}: header gives __metadata__ twice")
        if repeated:
            raise CheckpointError(f"{path}: header names {shown(repeated[0])} twice")
        metadata = header.pop("__metadata__", None)
        if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
            raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
        check_tree(metadata, depth=1)
    except JsonError as error:
        raise CheckpointError(f"{path}: header is not valid JSON: {error}") from error
    return header


def _fields(where: str, info: object) -> list[Any]:
    """dtype, shape and data_offsets of an entry: an object, where other fields are ignored, or a list of the three in this order."""
    if isinstance(info, list) and len(info) == len(_FIELDS):
        return info
    if not isinstance(info, dict):
        raise CheckpointError(f"{where}: entry is not an object")
    missing = [key for key in _FIELDS if key not in info]
    if missing:
        raise CheckpointError(f"{where}: entry lacks {', '.join(missing)}")
    twice = [key for key in _FIELDS if key in repeated_keys(info)]
    if twice:
        raise CheckpointError(f"{where}: entry gives {twice[0]} twice")
    if len(info) > len(_FIELDS):
        try:
            check_tree(info, depth=1)
        except JsonError as error:
            raise CheckpointError(f"{where}: entry is not valid JSON: {error}") from error
    return [info[key] for key in _FIELDS]


def _are_counts(values: list[Any]) -> bool:
    return set(map(type, values)) <= {int} and min(values, default=0) >= 0 and max(values, default=0) < _MOST


def _bits(where: str, dtype: str, shape: list[int]) -> int:
    """Bits of a tensor; every product on the way to them must fit 64 bits, as in safetensors."""
    count = 1
    for size in chain(shape, (BITS[dtype],)):
        count *= size
        if count >= _MOST:
            raise CheckpointError(f"{where}: shape {shown(shape)} overflows 64 bits")
    return count


def _parse_entry(identity: FileIdentity, name: str, info: object, data_start: int) -> TensorEntry:
    where = f"{identity.file}: tensor {shown(name)}"
    if not is_unicode(name):
        raise CheckpointError(f"{where}: the name is not valid Unicode")
    dtype, shape, offsets = _fields(where, info)
    if isinstance(dtype, dict) and list(dtype.values()) == [None] and not repeated_keys(dtype):
        # The other spelling of an enum's value in serde.
        dtype = next(iter(dtype))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{where}: unknown dtype {shown(dtype)}, expected one of {', '.join(BITS)}")
    if not isinstance(shape, list) or not _are_counts(shape):
        raise CheckpointError(f"{where}: shape must be a list of whole numbers from 0 to 2**64 - 1, got {shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not _are_counts(offsets):
        raise CheckpointError(f"{where}: data_offsets must be two whole numbers from 0 to 2**64 - 1, got {shown(offsets)}")
    begin, end = offsets
    bits = _bits(where, dtype, shape)
    if bits % 8:
        raise CheckpointError(f"{where}: {dtype} of shape {shown(shape)} does not fill whole bytes")
    if end - begin != bits // 8:
        raise CheckpointError(
            f"{where}: data_offsets {offsets} span {end - begin} bytes, {dtype} of shape {shown(shape)} needs {bits // 8}"
        )
    return TensorEntry(identity.file, data_start + begin, bits // 8, dtype, tuple(shape), identity)


def _check_cover(path: Path, entries: dict[str, TensorEntry], data_start: int, size: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    position, previous = data_start, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset + entry.nbytes > size:
            raise CheckpointError(
                f"{path}: truncated: tensor {shown(name)} ends at byte {entry.offset + entry.nbytes}, the file has {size} bytes"
            )
        if entry.offset < position:
            raise CheckpointError(f"{path}: tensors {shown(previous)} and {shown(name)} overlap")
        if entry.offset > position:
            raise CheckpointError(f"{path}: {entry.offset - position} bytes before tensor {shown(name)} belong to no tensor")
        position, previous = entry.offset + entry.nbytes, name
    if position != size:
        raise CheckpointError(f"{path}: {size - position} bytes after the last tensor belong to no tensor")


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, in the order of their bytes.

    Parameters
    ----------
    path
        A ``.safetensors`` file. Only its header is read.

    Returns
    -------
    dict[str, TensorEntry]
        By name, ordered by offset.

    Raises
    ------
    CheckpointError
        If the file cannot be read, or its header breaks a rule of the format: length, JSON, duplicate names, dtypes, shapes,
        offsets outside the file, sizes that do not fit dtype and shape, overlaps, holes, trailing bytes.
    """
    raw, identity = _read_prefix(path)
    data_start = 8 + len(raw)
    entries = {name: _parse_entry(identity, name, info, data_start) for name, info in _parse_header(path, raw).items()}
    _check_cover(path, entries, data_start, identity.size)
    return dict(sorted(entries.items(), key=lambda item: item[1].offset))


def read_metadata(path: Path) -> dict[str, str]:
    """The ``__metadata__`` of one safetensors file; empty where it has none.

    Raises
    ------
    CheckpointError
        If the file cannot be read or its header is not JSON of the right kind.
    """
    raw, _ = _read_prefix(path)
    _parse_header(path, raw)
    metadata: dict[str, str] = parse_json(raw).get("__metadata__") or {}
    return metadata


def write_header(
    tensors: list[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[int], int]:
    """The header of a file that holds ``tensors`` (name, dtype, shape) one after another.

    Parameters
    ----------
    tensors
        In the order of their bytes.
    metadata
        Strings to store besides ``format: pt``, which transformers asks for.

    Returns
    -------
    header
        Length field and JSON, padded with spaces to a multiple of 8 bytes, as safetensors does.
    offsets
        Where each tensor's bytes begin, counted from the file's start.
    size
        Bytes of the whole file.
    """
    described: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    relative, position = [], 0
    for name, dtype, shape in tensors:
        end = position + tensor_bytes(dtype, shape)
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        relative.append(position)
        position = end
    body = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    body += b" " * (-len(body) % 8)
    start = 8 + len(body)
    return struct.pack("<Q", len(body)) + body, [start + offset for offset in relative], start + position

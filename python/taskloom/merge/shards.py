"""Lays the output out: which tensor goes into which file, at which offset, under which header."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from taskloom.merge.errors import MergeError, shown
from taskloom.merge.header import BITS, tensor_bytes, write_header
from taskloom.merge.plan import OutputFile, TensorTarget

_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z]*)")
# A lone B is mergekit's "billions" (its 5B is 5e9 bytes), never single bytes.
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "b": 10**9}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str | int, name: str = "shard size") -> int:
    """Bytes of a size such as ``5GB``, ``500M``, ``1GiB``, ``5B`` (mergekit: 5 billion bytes) or a plain number.

    Raises
    ------
    MergeError
        If it is no size or not positive.
    """
    match = _SIZE.fullmatch(str(text).strip())
    unit = match["unit"].lower() if match else ""
    if len(unit) > 1:
        unit = unit.removesuffix("b")
    factor = _UNITS.get(unit, _BINARY.get(unit, 0))
    size = float(match["number"]) * factor if match else 0.0
    if not 1 <= size < math.inf:
        raise MergeError(f"{name}: expected a size such as 5GB, 500M or 1GiB, got {shown(text)}")
    return int(size)


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output before it has a place."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Layout:
    """Files with their headers, and every tensor's place; ``weight_map`` is empty for a single file."""

    files: tuple[OutputFile, ...]
    targets: dict[str, TensorTarget]
    weight_map: dict[str, str]
    total_size: int


def _split(tensors: Sequence[PlannedTensor], limit: int) -> list[list[PlannedTensor]]:
    """Fill shards in order; a tensor above the limit has a shard of its own."""
    shards: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def lay_out(tensors: Sequence[PlannedTensor], limit: int, *, stem: str = "model", metadata: Mapping[str, str] | None = None) -> Layout:
    """Place tensors into ``STEM.safetensors``, or into numbered shards of at most ``limit`` bytes of tensors each.

    Inside a file wider dtypes come first (stable otherwise), as safetensors writes them, so that every tensor is aligned to its
    element size. Every file's header holds ``metadata``.
    """
    shards = _split(tensors, limit)
    files, targets, weight_map = [], {}, {}
    for number, shard in enumerate(shards):
        name = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        placed = sorted(shard, key=lambda tensor: -BITS[tensor.dtype])
        header, offsets, size = write_header([(tensor.name, tensor.dtype, tensor.shape) for tensor in placed], metadata)
        files.append(OutputFile(name, header, size))
        for tensor, offset in zip(placed, offsets, strict=True):
            targets[tensor.name] = TensorTarget(number, offset, tensor.dtype)
            if len(shards) > 1:
                weight_map[tensor.name] = name
    return Layout(tuple(files), targets, weight_map, sum(tensor.nbytes for tensor in tensors))

"""Tensors of safetensors files as numpy arrays that are mapped from their files, a block at a time; needs no torch."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from taskloom.merge.errors import CheckpointError
from taskloom.merge.header import BITS, TensorEntry

Array = np.ndarray[Any, Any]
Item = TypeVar("Item")
Result = TypeVar("Result")

# Bytes of one thread's work: a piece, whose blocks stay in the cache while they are computed with.
PIECE_BYTES = 1 << 24
BLOCK = 1 << 15

_NUMPY = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "C64": np.complex64, "BOOL": np.uint8},
    **{"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64},
    **{"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64},
}
_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def has_values(dtype: str) -> bool:
    """Whether arithmetic is done on a dtype; entries of the others (8 bits and less of floating point) are bytes only."""
    return dtype in _NUMPY or dtype == "BF16"


def unit_bits(dtype: str) -> int:
    """Bits of what is counted as an entry: those of the dtype, or 8 where entries are smaller than a byte."""
    return max(8, BITS[dtype])


class Mappings:
    """Files of checkpoints, each mapped once."""

    def __init__(self) -> None:
        self._files: dict[Path, mmap.mmap] = {}

    def bits(self, entry: TensorEntry) -> Array:
        """A tensor's entries as unsigned integers of their width, flat, read-only, not copied.

        Raises
        ------
        CheckpointError
            If the file cannot be mapped, or is shorter than its header said.
        """
        kind = np.dtype(_UNSIGNED[8 if BITS[entry.dtype] < 8 else BITS[entry.dtype]])
        if entry.nbytes == 0:
            return np.empty(0, kind)
        try:
            if entry.file not in self._files:
                with open(entry.file, "rb") as file:
                    self._files[entry.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{entry.file}: cannot be read: {error}") from error
        mapped = self._files[entry.file]
        if len(mapped) < entry.offset + entry.nbytes:
            raise CheckpointError(
                f"{entry.file}: has {len(mapped)} bytes, expected {entry.offset + entry.nbytes}; it was cut short meanwhile"
            )
        return np.frombuffer(mapped, kind, entry.nbytes // kind.itemsize, entry.offset)


def values(bits: Array, dtype: str) -> Array:
    """A block's values: float32 for bfloat16 and float16, else the dtype's own kind."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    own = bits.view(_NUMPY[dtype])
    return own.astype(np.float32) if dtype == "F16" else own


def squared_norm(block: Array) -> float:
    """The sum of squares of a block of real or complex values, in float64."""
    real = block.view(block.real.dtype) if block.dtype.kind == "c" else block
    wide = real.astype(np.float64)
    # Not BLAS, whose own threads would be in the way of ours.
    return float(np.einsum("i,i->", wide, wide))


def blocks(begin: int, end: int) -> Iterator[slice]:
    """Slices of at most BLOCK entries."""
    for first in range(begin, end, BLOCK):
        yield slice(first, min(first + BLOCK, end))


def piece_bounds(entries: int, bits: int) -> Iterator[tuple[int, int]]:
    """Begin and end of the pieces of a tensor; one that is empty has none."""
    length = PIECE_BYTES * 8 // bits
    for begin in range(0, entries, length):
        yield begin, min(begin + length, entries)


def over_threads(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """``function`` of every item, in order, by several threads, with no more than a few items waiting."""
    team = threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    source = iter(items)
    with ThreadPoolExecutor(team) as pool:
        running = [pool.submit(function, item) for item in islice(source, 4 * team)]
        while running:
            yield running.pop(0).result()
            running += [pool.submit(function, item) for item in islice(source, 1)]

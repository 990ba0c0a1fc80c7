"""Streams tensors in pieces: read into reused buffers, worked on by a team of threads, written in place by position.

A piece stays in the cache between the ops on it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from taskloom.merge.errors import CheckpointError, OutputError
from taskloom.merge.header import BITS, TensorEntry
from taskloom.merge.pieces import open_to_read, read_at, share_out
from taskloom.merge.plan import TensorTarget
from taskloom.merge.shards import Layout

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64, "U8": torch.uint8}

COPIED_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    **TORCH_DTYPES,
}

CODES = {dtype: code for code, dtype in COPIED_DTYPES.items()}

# Entries of a piece: a multiple of 8, so that every piece's mask begins on a byte; small enough for its tensors to stay in a core's cache.
PIECE = 1 << 17


@dataclass(frozen=True)
class Piece:
    """Entries ``begin`` .. ``begin + count`` of tensor number ``tensor``; ``index`` counts all pieces."""

    index: int
    tensor: int
    begin: int
    count: int


def cut_pieces(sizes: Sequence[int], length: int = PIECE) -> Iterator[Piece]:
    """The pieces of tensors with so many entries, in order; an empty tensor has none."""
    index = 0
    for tensor, numel in enumerate(sizes):
        for begin in range(0, numel, length):
            yield Piece(index, tensor, begin, min(length, numel - begin))
            index += 1


def count_pieces(sizes: Sequence[int], length: int = PIECE) -> int:
    """How many pieces :func:`cut_pieces` gives."""
    return sum(-(-numel // length) for numel in sizes)


class Buffers:
    """Memory for pieces, by thread and slot, that is taken once and used again.

    Fresh tensors of this size for every piece would also leave the C library's heap in pieces that it cannot use again.
    """

    def __init__(self) -> None:
        self._own = threading.local()

    def take(self, count: int, dtype: torch.dtype, slot: int) -> Tensor:
        """A tensor [count] with anything in it; it is this thread's until it takes the same slot again."""
        slots: dict[int, Tensor] = self._own.__dict__.setdefault("slots", {})
        size = count * dtype.itemsize
        buffer = slots.get(slot)
        if buffer is None or buffer.numel() < size:
            buffer = slots[slot] = torch.empty(size, dtype=torch.uint8)
        return buffer[:size].view(dtype)


class Reader:
    """Reads pieces of tensors out of safetensors files; a context manager, safe to use from several threads."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._buffers = Buffers()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                descriptor = open_to_read(path)
                self._stack.callback(os.close, descriptor)
                self._descriptors[path] = descriptor
            return self._descriptors[path]

    def read_bytes(self, entry: TensorEntry, begin: int, count: int, slot: int = 0) -> Tensor:
        """Bytes of a tensor as uint8 [count]; valid until this thread reads into the same slot again."""
        read = self._buffers.take(count, torch.uint8, slot)
        read_at(self._descriptor(entry.file), entry.offset + begin, read.numpy().data, entry.file)
        return read

    def read_whole(self, entry: TensorEntry, name: str) -> Tensor:
        """A tensor of any dtype, in memory of its own; ``name`` is what errors call it.

        Raises
        ------
        CheckpointError
            If torch has no such dtype.
        """
        if entry.dtype not in COPIED_DTYPES:
            raise CheckpointError(f"{entry.file}: tensor {name!r} is {entry.dtype}, which torch has no dtype for")
        whole = torch.empty(entry.nbytes, dtype=torch.uint8)
        read_at(self._descriptor(entry.file), entry.offset, whole.numpy().data, entry.file)
        return whole.view(COPIED_DTYPES[entry.dtype]).reshape(entry.shape)

    def read(self, entry: TensorEntry, piece: Piece, slot: int = 0) -> Tensor:
        """A piece of a floating-point tensor, one-dimensional and in its dtype; valid as long as :meth:`read_bytes`."""
        width = BITS[entry.dtype] // 8
        return self.read_bytes(entry, piece.begin * width, piece.count * width, slot).view(TORCH_DTYPES[entry.dtype])


class Writer:
    """Writes pieces of tensors to their places in an output's files, which it makes with their headers; a context manager."""

    def __init__(self, layout: Layout, folder: Path) -> None:
        self._layout = layout
        self._folder = folder
        self._stack = ExitStack()
        self._descriptors: list[int] = []

    def __enter__(self) -> Writer:
        try:
            for file in self._layout.files:
                descriptor = os.open(self._folder / file.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                self._stack.callback(os.close, descriptor)
                self._descriptors.append(descriptor)
                # A disk without room says so now and not after an hour.
                os.posix_fallocate(descriptor, 0, file.size)
                self._put(descriptor, 0, memoryview(file.header))
        except OSError as error:
            self._stack.close()
            raise OutputError(f"{self._folder / file.name}: cannot be written: {error.strerror} ({file.size} bytes)") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @staticmethod
    def _put(descriptor: int, offset: int, content: memoryview) -> None:
        done = 0
        while done < len(content):
            done += os.pwrite(descriptor, content[done:], offset + done)

    def write(self, target: TensorTarget, begin: int, values: Tensor) -> None:
        """Put values, one-dimensional and in the target's dtype, at byte ``begin`` of a tensor."""
        try:
            self._put(self._descriptors[target.file], target.offset + begin, values.view(torch.uint8).numpy().data)
        except OSError as error:
            name = self._layout.files[target.file].name
            raise OutputError(f"{self._folder / name}: cannot be written: {error.strerror}") from error


class Progress:
    """Counts bytes from any thread and tells them from the calling one."""

    def __init__(self, tell: Callable[[int], None] | None) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self.done = 0

    def add(self, count: int) -> None:
        """Count bytes that were read or written."""
        with self._lock:
            self.done += count

    def tell(self, _piece: Piece | None = None) -> None:
        """Pass the count on."""
        if self._tell is not None:
            self._tell(self.done)


def run_pieces(
    pieces: Iterator[Piece], work: Callable[[Piece], None], threads: int, on_done: Callable[[Piece], None] | None = None
) -> None:
    """Do some work on every piece, several at a time.

    Parameters
    ----------
    pieces
        Are begun in order.
    work
        Called from several threads; each runs torch's ops on one core.
    threads
        The calling one included.
    on_done
        Called from the calling thread, after each of its own pieces.

    Raises
    ------
    Exception
        The first that the work of any thread raises; the others stop after their piece.
    """
    share_out(pieces, lambda: nullcontext(work), threads, on_done)

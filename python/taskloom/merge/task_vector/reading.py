"""Task vectors whose values stay in their files: the difference of two checkpoints, and a vector that was saved."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from taskloom.merge.align import align
from taskloom.merge.checkpoint import Checkpoint, open_checkpoint
from taskloom.merge.errors import CheckpointError
from taskloom.merge.header import BITS, FLOATING, TensorEntry
from taskloom.merge.identity import FileIdentity
from taskloom.merge.locate import locate
from taskloom.merge.pieces import open_to_read, read_at
from taskloom.merge.task_vector.checks import check_overflow, first_nonfinite, some
from taskloom.merge.task_vector.difference import subtract
from taskloom.merge.task_vector.sources import Slot, Source, Values
from taskloom.merge.torch_dtypes import TORCH_DTYPES


class _Pieces:
    """Reads pieces of one tensor of an open file into memory that the next piece takes again."""

    def __init__(self, descriptor: int, entry: TensorEntry, name: str, label: str) -> None:
        self._descriptor, self._entry = descriptor, entry
        self._where = f"model {label!r}: tensor {name!r}"
        self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")

    def piece(self, begin: int, count: int) -> Tensor:
        """Entries of the tensor in its own dtype.

        Raises
        ------
        CheckpointError
            If the file ends too early, or a value is not finite.
        """
        width = BITS[self._entry.dtype] // 8
        size = count * width
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
        read_at(self._descriptor, self._entry.offset + begin * width, self._buffer[:size].numpy().data, self._entry.file)
        values = self._buffer[:size].view(TORCH_DTYPES[self._entry.dtype])
        bad = first_nonfinite(values)
        if bad is not None:
            raise CheckpointError(f"{self._where} holds {bad[1]} at entry {begin + bad[0]}; only finite weights have a task vector")
        return values


@contextmanager
def _open_entry(entry: TensorEntry, name: str, label: str) -> Iterator[_Pieces]:
    """A tensor's pieces; CheckpointError where its file is no longer the one whose header was read, before or after."""
    identity = entry.identity
    assert identity is not None
    identity.check_unchanged()
    descriptor = open_to_read(identity.file)
    try:
        yield _Pieces(descriptor, entry, name, label)
        identity.check_unchanged()
    finally:
        os.close(descriptor)


class _Difference:
    def __init__(self, base: _Pieces, tuned: _Pieces, dtype: torch.dtype | None, where: str) -> None:
        self._base, self._tuned, self._dtype, self._where = base, tuned, dtype, where

    def piece(self, begin: int, count: int) -> Tensor:
        delta = subtract(self._base.piece(begin, count), self._tuned.piece(begin, count), self._dtype)
        check_overflow(delta, self._where)
        return delta


class CheckpointSource(Source):
    """The difference of two checkpoints, whose headers were read and nothing else.

    Attributes
    ----------
    base, tuned
        The checkpoints.
    dtype
        What deltas are rounded to; None leaves them in float32 or float64.
    """

    streams = True

    def __init__(self, base: Checkpoint, tuned: Checkpoint, dtype: torch.dtype | None) -> None:
        self.base, self.tuned, self.dtype = base, tuned, dtype
        self._entries: dict[str, tuple[TensorEntry, TensorEntry]] = {}
        slots: dict[str, Slot] = {}
        for tensor in align(base, [tuned]).tensors:
            if tensor.members is None:
                continue
            (entry,) = tensor.members
            wide = "F64" in (entry.dtype, tensor.reference.dtype)
            self._entries[tensor.name] = tensor.reference, entry
            slots[tensor.name] = Slot(tensor.reference.shape, dtype or (torch.float64 if wide else torch.float32), None)
        self.slots = slots
        unread = {name: entry.dtype for name, entry in base.tensors.items() if entry.dtype not in FLOATING and entry.dtype[0] in "FC"}
        if unread:
            dtypes = ", ".join(sorted(set(unread.values())))
            warnings.warn(f"TaskVector: model {base.label!r}: tensors of {dtypes} have no delta here: {some(unread)}", stacklevel=4)

    @contextmanager
    def opened(self, name: str) -> Iterator[Values]:
        base, tuned = self._entries[name]
        with _open_entry(base, name, self.base.label) as before, _open_entry(tuned, name, self.tuned.label) as after:
            yield _Difference(before, after, self.dtype, f"model {self.tuned.label!r}: tensor {name!r}")


class FileSource(Source):
    """Deltas in a safetensors file, of which the header was read."""

    streams = True

    def __init__(self, entries: Mapping[str, TensorEntry], identity: FileIdentity) -> None:
        self.identity = identity
        self._entries = dict(entries)
        self.slots = {name: Slot(entry.shape, TORCH_DTYPES[entry.dtype], None) for name, entry in entries.items()}

    @contextmanager
    def opened(self, name: str) -> Iterator[Values]:
        with _open_entry(self._entries[name], name, str(self.identity.file)) as pieces:
            yield pieces


def _open(label: str) -> Checkpoint:
    located = locate(label)
    # A vector outlives a change of the working directory.
    return open_checkpoint(replace(located, path=located.path.absolute()))


def open_difference(base: str, tuned: str, dtype: torch.dtype | None) -> CheckpointSource:
    """Find and open two checkpoints, as a recipe names them, and match their tensors.

    Raises
    ------
    CheckpointError
        If one cannot be found, is damaged, or does not fit the other.
    """
    return CheckpointSource(_open(base), _open(tuned), dtype)

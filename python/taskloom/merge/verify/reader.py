"""Reads pieces of tensors from safetensors files into fresh torch tensors, and cuts tensors into pieces."""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from taskloom.merge.errors import CheckpointError
from taskloom.merge.header import BITS
from taskloom.merge.plan import TensorJob
from taskloom.merge.torch_dtypes import TORCH_DTYPES

# Entries of all models that are held at once. The temporaries of the reference stay in the cache then: ten times faster than large pieces.
PIECE_ENTRIES = 1 << 19


def is_ranked_by_row(job: TensorJob) -> bool:
    """Whether a piece must hold whole rows, because selection ranks the entries of a row."""
    stages = job.stages
    if stages is None or not job.shape or stages.scope != "row" or stages.select not in ("magnitude", "rank_dropout"):
        return False
    # One row is a tensor, whose ranks can be found in passes.
    return stages.select == "rank_dropout" or prod(job.shape) != job.shape[-1]


def pieces(job: TensorJob) -> Iterator[tuple[int, int]]:
    """Begin and length of each piece of a job's tensor; whole rows where it is ranked by row."""
    numel = prod(job.shape)
    length = max(1, PIECE_ENTRIES // (len(job.tuned) + 4))
    if is_ranked_by_row(job):
        row = max(1, job.shape[-1])
        length = max(1, length // row) * row
    for begin in range(0, numel, length):
        yield begin, min(length, numel - begin)


class TensorReader:
    """Open files by path, and their bytes as flat tensors; a context manager that closes them."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def read_bytes(self, path: Path, offset: int, count: int) -> Tensor:
        """``count`` bytes at ``offset`` as uint8.

        Raises
        ------
        CheckpointError
            If the file cannot be read or ends before.
        """
        buffer = torch.empty(count, dtype=torch.uint8)
        view, done = buffer.numpy().data, 0
        try:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY)
            while done < count:
                got = os.preadv(self._files[path], [view[done:]], offset + done)
                if got == 0:
                    raise CheckpointError(f"{path}: ends at byte {offset + done}, expected {offset + count}; it was cut short meanwhile")
                done += got
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        return buffer

    def read(self, path: Path, offset: int, dtype: str, begin: int, count: int) -> Tensor:
        """Entries ``begin .. begin + count`` of a floating-point tensor whose bytes start at ``offset``."""
        size = BITS[dtype] // 8
        return self.read_bytes(path, offset + begin * size, count * size).view(TORCH_DTYPES[dtype])

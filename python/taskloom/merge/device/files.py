"""Input files read by position into buffers, with the messages that the compiled executor has for what can go wrong."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from taskloom.merge.errors import CheckpointError
from taskloom.merge.input_files import open_regular


def bytes_of(buffer: Tensor, count: int) -> memoryview:
    """The first ``count`` bytes of a contiguous tensor in host memory, without NumPy."""
    return memoryview((ctypes.c_char * count).from_address(buffer.data_ptr())).cast("B")


class InputFiles:
    """The inputs of a plan, open for reading; a context manager that closes them.

    Raises
    ------
    CheckpointError
        If one cannot be opened.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._open = ExitStack()
        self._descriptors: list[int] = []
        self._sizes: list[int] = []
        try:
            for path in paths:
                descriptor = self._open.enter_context(open_regular(path)).fileno()
                self._descriptors.append(descriptor)
                self._sizes.append(os.fstat(descriptor).st_size)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the files."""
        self._open.close()

    def read(self, file: int, offset: int, buffer: Tensor, count: int) -> None:
        """Read ``count`` bytes at ``offset`` of one file into the beginning of a buffer.

        Raises
        ------
        CheckpointError
            If the file cannot be read, or is shorter.
        """
        view, done = bytes_of(buffer, count), 0
        try:
            while done < count:
                got = os.preadv(self._descriptors[file], [view[done:]], offset + done)
                if got == 0:
                    raise self._too_short(file)
                done += got
        except OSError as error:
            reason = f"the disk or network under it reported an error: {error.strerror}"
            raise CheckpointError(f"{self._paths[file]} could not be read: {reason}") from error

    def _too_short(self, file: int) -> CheckpointError:
        path, before, now = self._paths[file], self._sizes[file], os.fstat(self._descriptors[file]).st_size
        if now < before:
            return CheckpointError(f"{path} was cut short while it was read: {before} bytes before, {now} now")
        return CheckpointError(f"{path} is shorter than its header says: it changed after it was read")

"""Tells one version of an input file from another, without reading its weights."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from taskloom.merge.errors import CheckpointError


@dataclass(frozen=True)
class FileIdentity:
    """A file as it was when its header was read.

    Attributes
    ----------
    file
        The path it was opened by.
    size, modified_ns
        Size in bytes, and time of the last change in nanoseconds since 1970.
    header_digest
        xxh3_128 of the header's bytes.
    inode
        Tells a file from another one that was moved into its place; it means nothing beyond this machine, so it is not compared with
        what an earlier merge wrote down.
    """

    file: Path
    size: int
    modified_ns: int
    header_digest: str
    inode: tuple[int, int] = field(compare=False)

    @classmethod
    def of(cls, path: Path, status: os.stat_result, header: bytes) -> FileIdentity:
        """The identity of an opened file, from its ``fstat`` and its header."""
        import xxhash

        digest = xxhash.xxh3_128(header).hexdigest()
        return cls(path, status.st_size, status.st_mtime_ns, digest, (status.st_dev, status.st_ino))

    def check_unchanged(self) -> None:
        """Look at the file again.

        Raises
        ------
        CheckpointError
            If it was written to, replaced or removed since its header was read.
        """
        try:
            now = os.stat(self.file)
        except OSError as error:
            raise CheckpointError(f"{self.file}: cannot be read any more: {error.strerror}") from error
        if now.st_size != self.size:
            raise CheckpointError(f"{self.file}: changed while it was read: {self.size} bytes before, {now.st_size} now")
        if (now.st_dev, now.st_ino) != self.inode:
            raise CheckpointError(f"{self.file}: changed while it was read: another file has taken its place")
        if now.st_mtime_ns != self.modified_ns:
            raise CheckpointError(f"{self.file}: changed while it was read: it was written to")

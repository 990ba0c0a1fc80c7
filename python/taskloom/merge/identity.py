"""Tells one version of an input file from another, without reading its weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from taskloom.merge.errors import CheckpointError

_BLOCK = 4096
_BLOCKS = 64


def _sampled(size: int) -> Sequence[int]:
    """Offsets of the blocks that stand for a file of ``size`` bytes; all of them where it is small."""
    return range(0, size, max(_BLOCK, size // _BLOCKS))


@dataclass(frozen=True)
class FileIdentity:
    """A file as it was when its header was read.

    Attributes
    ----------
    file
        The path it was opened by, made absolute.
    size, modified_ns
        Size in bytes, and time of the last change in nanoseconds since 1970.
    header_digest, sample_digest
        xxh3_128 of the header's bytes, and of 64 blocks of 4 KiB spread evenly over the file: two fine-tunings of one base have one
        header, and may have one time.
    inode
        Tells a file from another one that was moved into its place; it means nothing beyond this machine, so it is not compared with
        what an earlier merge wrote down.
    """

    file: Path
    size: int
    modified_ns: int
    header_digest: str
    sample_digest: str
    inode: tuple[int, int] = field(compare=False)

    @classmethod
    def of(cls, path: Path, descriptor: int, header: bytes) -> FileIdentity:
        """The identity of an opened file with this header."""
        import xxhash

        status = os.fstat(descriptor)
        sample = xxhash.xxh3_128()
        for offset in _sampled(status.st_size):
            sample.update(os.pread(descriptor, _BLOCK, offset))
        return cls(
            Path(os.path.abspath(path)),
            status.st_size,
            status.st_mtime_ns,
            xxhash.xxh3_128(header).hexdigest(),
            sample.hexdigest(),
            (status.st_dev, status.st_ino),
        )

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

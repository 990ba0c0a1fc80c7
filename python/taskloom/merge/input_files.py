"""Opens the files of a model: regular files only, and small ones only up to a limit."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from taskloom.merge.errors import CheckpointError, shown
from taskloom.merge.strict_json import is_unicode

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def is_plain_name(name: str) -> bool:
    """Whether ``name`` can only mean an entry of the folder that it is looked up in."""
    plain = name not in ("", ".", "..") and not any(character in name for character in "/\\\0")
    return plain and is_unicode(name)


def check_name(path: Path) -> None:
    """Refuse a path that no report could name: file systems hold any bytes, JSON and YAML only text."""
    if not is_unicode(str(path)):
        raise CheckpointError(f"{shown(str(path))}: the name is not valid Unicode")


def _check_kind(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: is {_KINDS.get(stat.S_IFMT(mode), 'not a file')}, expected a regular file")


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        return CheckpointError(f"{path}: cannot be read: it is a link to {shown(os.readlink(path))}, which does not exist")
    return CheckpointError(f"{path}: cannot be read: {error.strerror}")


def check_regular(path: Path) -> None:
    """Refuse what :func:`open_regular` would refuse, without opening it."""
    try:
        _check_kind(path, os.stat(path).st_mode)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path}: cannot be read: {os.strerror(errno.EACCES)}")


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading.

    Raises
    ------
    CheckpointError
        If it is a directory, a pipe, a socket or a device, or cannot be read. A pipe is never waited for, a device never opened.
    """
    try:
        _check_kind(path, os.stat(path).st_mode)
        # What took its place since may be a pipe, whose opening would wait for a writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            _check_kind(path, os.fstat(file.fileno()).st_mode)
            yield file
    except OSError as error:
        raise _unreadable(path, error) from error


def read_regular(path: Path, most: int) -> bytes:
    """The content of a regular file of at most ``most`` bytes; raises CheckpointError where it is none, or larger."""
    with open_regular(path) as file:
        # Not most + 1: so much memory would be taken at once, whatever the file holds.
        content = file.read(min(os.fstat(file.fileno()).st_size, most) + 1)
    if len(content) > most:
        raise CheckpointError(f"{path}: is above the limit of {most} bytes")
    return content

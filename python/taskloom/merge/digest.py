"""Digests of whole files: xxh3_128, which keeps up with memory and which ``xxhsum -H2`` computes too."""

from __future__ import annotations

from pathlib import Path

_PIECE = 2**20


def file_digest(path: Path) -> str:
    """xxh3_128 of a file's bytes as 32 hexadecimal digits.

    It finds damage, not forgery: it is no cryptographic hash.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    import xxhash

    found = xxhash.xxh3_128()
    buffer = bytearray(_PIECE)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found.update(view[:count])
    return found.hexdigest()

"""The journal of a merge: which merge it is, and which of its files are finished. One line of JSON per fact, synced as it is written.

A line that a crash cut off is no fact; everything before it stands.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from taskloom.merge.execute import FinishedFile, TensorStats
from taskloom.merge.identity import FileIdentity

_FORMAT = 1
_START = b'{"journal": '


@dataclass(frozen=True)
class Fingerprint:
    """What a merge is made of: two merges with one fingerprint write the same bytes.

    Attributes
    ----------
    taskloom
        Version that makes it.
    recipe
        Digest of the recipe with models pinned and the seed filled in.
    layout
        Digest of the output files' names, sizes and headers.
    inputs
        Every file of every model.
    allow_nonfinite
        Whether values that are not finite pass.
    """

    taskloom: str
    recipe: str
    layout: str
    inputs: tuple[FileIdentity, ...]
    allow_nonfinite: bool = False

    def difference(self, earlier: Fingerprint) -> str | None:
        """What changed since an earlier merge, in words; None where nothing did."""
        if self.recipe != earlier.recipe:
            return "it was made by another recipe or seed"
        if earlier.allow_nonfinite and not self.allow_nonfinite:
            return "it was made with allow_nonfinite (--allow-nonfinite)"
        before = {identity.file: identity for identity in earlier.inputs}
        for identity in self.inputs:
            if identity.file not in before:
                return f"{identity.file} was not among its inputs"
            if identity != before[identity.file]:
                return f"its input {identity.file} has changed since"
        if len(before) != len(self.inputs):
            return "it had other inputs"
        if self.layout != earlier.layout:
            return "its output files were laid out differently (shard size)"
        if self.taskloom != earlier.taskloom:
            return f"it was made by taskloom {earlier.taskloom}, this is {self.taskloom}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """The fingerprint as plain types."""
        inputs = [
            {
                "file": str(item.file),
                "bytes": item.size,
                "modified_ns": item.modified_ns,
                "header_digest": item.header_digest,
                "sample_digest": item.sample_digest,
            }
            for item in self.inputs
        ]
        return {
            "taskloom": self.taskloom,
            "recipe": self.recipe,
            "layout": self.layout,
            "inputs": inputs,
            "allow_nonfinite": self.allow_nonfinite,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Fingerprint:
        """The inverse of :meth:`to_dict`; raises KeyError, TypeError or ValueError for anything else."""
        inputs = tuple(
            FileIdentity(
                Path(item["file"]),
                int(item["bytes"]),
                int(item["modified_ns"]),
                str(item["header_digest"]),
                str(item["sample_digest"]),
                (0, 0),
            )
            for item in plain["inputs"]
        )
        return cls(str(plain["taskloom"]), str(plain["recipe"]), str(plain["layout"]), inputs, bool(plain["allow_nonfinite"]))


@dataclass(frozen=True)
class JournalState:
    """What a journal says.

    ``begun`` is the fingerprint of the merge (None where none was begun), ``finished`` its finished files by name, ``replacement`` the
    inode of the finished folder from the moment on when it takes the place of an existing one, and ``length`` the bytes of whole lines.
    """

    begun: Fingerprint | None
    finished: dict[str, FinishedFile]
    replacement: int | None
    length: int


def _finished_file(plain: Mapping[str, Any]) -> FinishedFile:
    tensors = tuple(TensorStats(**tensor) for tensor in plain["tensors"])
    return FinishedFile(str(plain["name"]), int(plain["bytes"]), str(plain["digest"]), float(plain["seconds"]), tensors)


class Journal:
    """An open journal file.

    Parameters
    ----------
    descriptor
        Of the file, open for reading and writing; it stays the caller's.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def is_one(self) -> bool:
        """Whether the file is empty or begins as a journal does, be it torn."""
        start = os.pread(self._descriptor, len(_START), 0)
        return _START.startswith(start)

    def read(self) -> JournalState:
        """Everything up to the first line that is not whole."""
        raw = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
        begun: Fingerprint | None = None
        finished: dict[str, FinishedFile] = {}
        replacement: int | None = None
        length = 0
        for line in raw.splitlines(keepends=True):
            try:
                fact = json.loads(line) if line.endswith(b"\n") else {}
                if fact.get("journal") == _FORMAT:
                    begun = Fingerprint.from_dict(fact["merge"])
                elif begun is not None and "finished" in fact:
                    file = _finished_file(fact["finished"])
                    finished[file.name] = file
                elif begun is not None and "replacement" in fact:
                    replacement = int(fact["replacement"])
                else:
                    break
            except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
                break
            length += len(line)
        return JournalState(begun, finished, replacement, length)

    def _append(self, fact: Mapping[str, Any]) -> None:
        line = json.dumps(fact, allow_nan=True).encode("ascii") + b"\n"
        while line:
            line = line[os.write(self._descriptor, line) :]
        os.fsync(self._descriptor)

    def truncate(self, length: int) -> None:
        """Drop everything after ``length`` bytes; what is added next follows there."""
        os.ftruncate(self._descriptor, length)
        os.lseek(self._descriptor, length, os.SEEK_SET)

    def begin(self, merge: Fingerprint) -> None:
        """Start anew with another merge."""
        self.truncate(0)
        self._append({"journal": _FORMAT, "process": os.getpid(), "merge": merge.to_dict()})

    def finish(self, file: FinishedFile) -> None:
        """Add a finished file, which must be on the disk by now."""
        self._append({"finished": asdict(file)})

    def replace(self, inode: int) -> None:
        """Add that the finished folder with this inode is about to take the place of an existing one."""
        self._append({"replacement": inode})

"""Opens an archive: reads its headers, checks them against each other, and gives its tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from taskloom.archive.format import (
    BASE,
    MASK,
    VECTOR,
    ArchivedTask,
    ArchiveError,
    ArchiveInfo,
    base_name,
    mask_bytes,
    mask_name,
    parse_metadata,
    vector_name,
)
from taskloom.merge.checkpoint import Checkpoint, open_checkpoint
from taskloom.merge.errors import CheckpointError, near_miss
from taskloom.merge.header import FLOATING, TensorEntry, read_metadata
from taskloom.merge.locate import Located, locate

if TYPE_CHECKING:
    from torch import Tensor

    from taskloom.archive.memory import TallArchive


@dataclass(frozen=True)
class OpenedArchive:
    """An archive in its files. Headers are read and checked; weights stay where they are until they are asked for.

    Attributes
    ----------
    path
        The folder, or the file of an archive that is one file.
    info
        What its metadata say: tasks, thresholds, vector, recipe.
    checkpoint
        Its tensors by their names in the archive.
    """

    path: Path
    info: ArchiveInfo
    checkpoint: Checkpoint

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the recipe's order."""
        return tuple(task.name for task in self.info.tasks)

    @property
    def nbytes(self) -> int:
        """Bytes of its safetensors files."""
        return sum(identity.size for identity in self.checkpoint.files)

    def task(self, name: str) -> ArchivedTask:
        """A task by its name.

        Raises
        ------
        CheckpointError
            If there is none; lists those that there are.
        """
        for task in self.info.tasks:
            if task.name == name:
                return task
        raise CheckpointError(f"{self.path}: has no task {name!r}; its tasks are {', '.join(self.tasks)}{near_miss(name, self.tasks)}")

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file is not the one that was opened, or was written to since."""
        for identity in self.checkpoint.files:
            identity.check_unchanged()

    def tensors(self) -> dict[str, TensorEntry]:
        """The base's tensors, by the names that a restored checkpoint has."""
        return {name.removeprefix(BASE): entry for name, entry in self.checkpoint.tensors.items() if name.startswith(BASE)}

    def has_mask(self, tensor: str) -> bool:
        """Whether a tensor is a task's own; the others are the base's in every task."""
        return vector_name(tensor) in self.checkpoint.tensors

    def masks(self, task: str) -> dict[str, Tensor]:
        """A task's masks in memory: uint8 [ceil(numel / 8)] by tensor, as :func:`taskloom.unpack_mask` takes them.

        Raises
        ------
        CheckpointError
            If there is no such task, or a file cannot be read or has changed since it was opened.
        """
        from taskloom.archive.extract import read_masks

        return read_masks(self, self.task(task))

    def state_dict(self, task: str) -> dict[str, Tensor]:
        """A task's restored weights in memory, each in the task's dtype, on the CPU.

        Raises
        ------
        CheckpointError
            If there is no such task, a file cannot be read or has changed since it was opened, or the archive is damaged.
        """
        from taskloom.archive.extract import restored_state

        return restored_state(self, self.task(task))

    def load(self) -> TallArchive:
        """The whole archive in memory, from where it switches a live module between its tasks.

        Raises
        ------
        CheckpointError
            If a file cannot be read or the archive is damaged.
        """
        from taskloom.archive.files import load_archive

        return load_archive(self)


def _check_shared(where: str, tensors: Mapping[str, TensorEntry], name: str, info: ArchiveInfo) -> int:
    """Check vector and masks of one tensor against the base's; returns its entries."""
    vector, base = tensors[vector_name(name)], tensors.get(base_name(name))
    if base is None:
        raise ArchiveError(f"{where}: tensor {base_name(name)!r} is missing; {vector_name(name)!r} belongs to it")
    if base.dtype not in FLOATING:
        raise ArchiveError(f"{where}: tensor {base_name(name)!r} is {base.dtype}, expected one of {', '.join(FLOATING)}")
    if vector.dtype not in ("F32", "F64") or vector.shape != base.shape:
        raise ArchiveError(
            f"{where}: tensor {vector_name(name)!r} is {vector.dtype} {list(vector.shape)}, expected F32 or F64 {list(base.shape)}"
        )
    for task in info.tasks:
        stored = mask_name(task.name, name)
        mask = tensors.get(stored)
        if mask is None:
            raise ArchiveError(f"{where}: tensor {stored!r} is missing")
        if mask.dtype != "U8" or mask.shape != (mask_bytes(base.numel),):
            raise ArchiveError(
                f"{where}: tensor {stored!r} is {mask.dtype} {list(mask.shape)}, expected U8 [{mask_bytes(base.numel)}] for the "
                f"{base.numel} entries of {base_name(name)!r}"
            )
    return base.numel


def _check(where: str, tensors: Mapping[str, TensorEntry], info: ArchiveInfo) -> None:
    shared = [name.removeprefix(VECTOR) for name in tensors if name.startswith(VECTOR)]
    parameters = sum(_check_shared(where, tensors, name, info) for name in shared)
    known = {mask_name(task.name, name) for task in info.tasks for name in shared}
    for name in tensors:
        if not name.startswith((BASE, VECTOR)) and name not in known:
            whose = "no task or vector of the archive" if name.startswith(MASK) else "no part of an archive"
            raise ArchiveError(f"{where}: tensor {name!r} belongs to {whose}")
    if (len(shared), parameters) != (info.tensors, info.parameters):
        raise ArchiveError(
            f"{where}: holds {len(shared)} tensors with masks ({parameters} entries), its metadata says {info.tensors} ({info.parameters})"
        )
    for task in info.tasks:
        strange = sorted(set(task.dtypes) - set(shared))
        if strange:
            raise ArchiveError(f"{where}: damaged metadata: dtypes of task {task.name!r} names {strange[0]!r}, which has no mask")


def open_archive(archive: str | Path) -> OpenedArchive:
    """Open a TALL-mask archive and check that its parts fit each other. No weights are read.

    Parameters
    ----------
    archive
        A folder that ``taskloom compress`` wrote, its file where it is one file, or a Hugging Face id of such a folder.

    Raises
    ------
    CheckpointError
        If it cannot be found or read, is no archive, is of a later version, or is damaged: tensors that are missing or belong to
        nothing, masks whose length disagrees with the shapes, metadata that cannot be read or differ between its files.
    """
    located = Located(str(archive), archive) if isinstance(archive, Path) and archive.exists() else locate(str(archive))
    checkpoint = open_checkpoint(located)
    where = str(located.path)
    described = {path: read_metadata(path) for path in sorted({entry.file for entry in checkpoint.tensors.values()})}
    if not described:
        raise CheckpointError(f"{where}: is no TALL-mask archive: it holds no tensor")
    first = next(iter(described))
    info = parse_metadata(described[first], str(first))
    for path, metadata in described.items():
        if metadata != described[first]:
            raise CheckpointError(f"{path}: its metadata is not that of {first.name}; the files are of different archives")
    _check(where, checkpoint.tensors, info)
    return OpenedArchive(located.path, info, checkpoint)

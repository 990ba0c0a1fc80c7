"""The archive's file format: how its tensors are named, and the metadata in every file's header (docs/formats.md).

Needs no torch: a header is enough to list an archive or to plan one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from taskloom.merge.errors import CheckpointError
from taskloom.merge.header import FLOATING

FORMAT = "tall_masks"
VERSION = 1
STEM = "tall_masks"
INDEX = f"{STEM}.safetensors.index.json"
REPORT = "compress_report.json"

BASE, VECTOR, MASK = "base/", "vector/", "mask/"


class ArchiveError(CheckpointError, ValueError):
    """An archive whose parts do not fit each other."""


def base_name(tensor: str) -> str:
    """Where the archive keeps a tensor of the base."""
    return BASE + tensor


def vector_name(tensor: str) -> str:
    """Where the archive keeps a tensor of the shared vector."""
    return VECTOR + tensor


def mask_name(task: str, tensor: str) -> str:
    """Where the archive keeps a task's mask of a tensor; a task's name holds no slash, so that this can be taken apart again."""
    return f"{MASK}{task}/{tensor}"


def mask_bytes(numel: int) -> int:
    """Bytes of a packed mask."""
    return -(-numel // 8)


def why_no_task_name(name: str) -> str | None:
    """What is wrong with a task's name; None for a good one. It names tensors, and a folder where a task is extracted."""
    if not name or not name.isprintable():
        return "must be printable and not empty"
    if len(name.encode(errors="replace")) > 128:
        return "must not be longer than 128 bytes"
    if "/" in name or "\\" in name:
        return "must not contain a slash"
    if name.startswith((".", "-")) or name != name.strip():
        return "must not begin with a dot or a dash, nor begin or end with a space"
    return None


@dataclass(frozen=True)
class ArchivedTask:
    """One task of an archive.

    Attributes
    ----------
    name
        Of the task.
    model
        The model it was, as the recipe names it.
    tall_mask_lambda
        Threshold of its masks.
    dtypes
        safetensors codes of its floating-point tensors whose dtype is not the base's, by the tensor's name.
    """

    name: str
    model: str
    tall_mask_lambda: float
    dtypes: dict[str, str]


@dataclass(frozen=True)
class ArchiveInfo:
    """What an archive says about itself.

    Attributes
    ----------
    tasks
        In the recipe's order.
    vector
        How the shared vector was made: ``sum`` or ``ties``.
    density
        Per task, the share of entries that the trim kept (``ties`` only, else empty).
    tensors, parameters
        Number of tensors that have masks, and of their entries.
    base_model
        The base, as the recipe names it.
    recipe
        The recipe's YAML.
    taskloom
        Version that wrote it.
    """

    tasks: tuple[ArchivedTask, ...]
    vector: str
    density: tuple[float, ...]
    tensors: int
    parameters: int
    base_model: str
    recipe: str
    taskloom: str

    def to_metadata(self) -> dict[str, str]:
        """The strings of a header's ``__metadata__``."""
        return {
            "taskloom_archive": FORMAT,
            "taskloom_archive_version": str(VERSION),
            "taskloom_version": self.taskloom,
            "base_model": self.base_model,
            "tasks": json.dumps([asdict(task) for task in self.tasks], ensure_ascii=False),
            "vector": self.vector,
            "density": json.dumps(self.density),
            "tensors": str(self.tensors),
            "parameters": str(self.parameters),
            "recipe": self.recipe,
        }


def _is_threshold(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _task_of(plain: Any) -> ArchivedTask:
    name, model, threshold, dtypes = plain["name"], plain["model"], plain["tall_mask_lambda"], plain["dtypes"]
    if not isinstance(name, str) or why_no_task_name(name) is not None:
        raise ValueError(f"{name!r} is no task name")
    if not _is_threshold(threshold):
        raise ValueError(f"tall_mask_lambda of task {name!r}: expected a finite number > 0, got {threshold!r}")
    if not isinstance(dtypes, dict) or not all(dtype in FLOATING for dtype in dtypes.values()):
        raise ValueError(f"dtypes of task {name!r}: expected one of {', '.join(FLOATING)} for each tensor")
    return ArchivedTask(name, str(model), float(threshold), dtypes)


def parse_metadata(metadata: Mapping[str, str], where: str) -> ArchiveInfo:
    """The inverse of :meth:`ArchiveInfo.to_metadata`.

    Parameters
    ----------
    metadata
        Of a safetensors header.
    where
        Names the file in error messages.

    Raises
    ------
    CheckpointError
        If it is no archive's, of a later version, or damaged.
    """
    if metadata.get("taskloom_archive") != FORMAT:
        raise CheckpointError(f"{where}: is no TALL-mask archive: its metadata has no taskloom_archive: {FORMAT}")
    version = metadata.get("taskloom_archive_version", "")
    if not re.fullmatch(r"[1-9][0-9]{0,8}", version):
        raise CheckpointError(f"{where}: metadata taskloom_archive_version: expected a whole number, got {version!r}")
    if int(version) > VERSION:
        raise CheckpointError(f"{where}: is an archive of version {version}, this taskloom reads version {VERSION}")
    try:
        tasks = tuple(_task_of(plain) for plain in json.loads(metadata["tasks"]))
        density = tuple(float(share) for share in json.loads(metadata["density"]))
        info = ArchiveInfo(
            tasks=tasks,
            vector=metadata["vector"],
            density=density,
            tensors=int(metadata["tensors"]),
            parameters=int(metadata["parameters"]),
            base_model=metadata["base_model"],
            recipe=metadata["recipe"],
            taskloom=metadata["taskloom_version"],
        )
    except KeyError as error:
        raise CheckpointError(f"{where}: damaged metadata: {error.args[0]} is missing") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: damaged metadata: {error}") from error
    names = [task.name for task in tasks]
    if not names or len(set(names)) != len(names):
        raise CheckpointError(f"{where}: damaged metadata: tasks: expected at least one, each with a name of its own, got {names}")
    return info

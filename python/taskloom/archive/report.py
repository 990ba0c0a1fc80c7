"""What a compression did: bytes before and after, and per task the mask's density and the error of restoring."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from taskloom.archive.planned import PlannedArchive, bytes_by_part, model_bytes
from taskloom.merge.output import write_json

REPORT_VERSION = 1


@dataclass(frozen=True)
class ArchiveSizes:
    """Bytes of files before and after.

    Attributes
    ----------
    archive
        All files of the archive's tensors, with their headers.
    base, vector, masks
        Its tensors by part.
    separate
        The tasks' checkpoints.
    separate_and_base
        The tasks' checkpoints and the base.
    """

    archive: int
    base: int
    vector: int
    masks: int
    separate: int
    separate_and_base: int

    @property
    def ratio(self) -> float:
        """The archive's share of the tasks' checkpoints."""
        return self.archive / self.separate


@dataclass(frozen=True)
class TaskFigures:
    """One task.

    Attributes
    ----------
    task, model, tall_mask_lambda
        Its name, where it came from, and the threshold of its masks.
    bytes
        Of its checkpoint's files.
    mask_density
        Share of entries that its masks set; None in a preview, and where there is no entry.
    relative_error
        ``||restored - task|| / ||task - base||`` over all tensors with masks; None in a preview, and for a task that equals the base.
    """

    task: str
    model: str
    tall_mask_lambda: float
    bytes: int
    mask_density: float | None
    relative_error: float | None


@dataclass(frozen=True)
class CompressReport:
    """A finished archive, or with ``preview`` one that was only planned.

    Attributes
    ----------
    version
        Of this report's fields: 1.
    output
        The archive's folder; None in a preview without one.
    preview
        True where nothing was written.
    base_model, vector, density
        What was compressed, and how its shared vector was made.
    parameters, tensors, copied
        Entries and tensors with masks, and the names of the base's tensors without.
    sizes
        Bytes before and after; ``ratio`` is the archive's share of the tasks' checkpoints.
    tasks
        In the recipe's order.
    files
        Name and bytes of each safetensors file.
    seconds, bytes_read, bytes_written
        Wall time of reading, computing and writing (0 in a preview), and bytes of tensors, each input tensor counted once.
    notes
        What was copied or left out.
    taskloom
        Version that made it.
    """

    version: int
    output: str | None
    preview: bool
    base_model: str
    vector: str
    density: list[float]
    parameters: int
    tensors: int
    copied: list[str]
    sizes: ArchiveSizes
    tasks: list[TaskFigures]
    files: list[dict[str, Any]]
    seconds: float
    bytes_read: int
    bytes_written: int
    notes: list[str]
    taskloom: str

    def to_dict(self) -> dict[str, Any]:
        """The report as plain types."""
        plain = asdict(self)
        plain["sizes"]["ratio"] = self.sizes.ratio
        return plain

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        write_json(path, self.to_dict())


@dataclass(frozen=True)
class Measured:
    """What the streaming pass counted per task: set bits, and sums of squares of restored - task and of task - base."""

    ones: list[int]
    errors: list[float]
    norms: list[float]
    seconds: float


def _too_few_tasks(sizes: ArchiveSizes, tasks: int) -> list[str]:
    """A note where the archive is no smaller than the checkpoints, with the number of such tasks from which it is."""
    saved = (sizes.separate - sizes.masks) / tasks
    if sizes.archive < sizes.separate or saved <= 0:
        return []
    fewest = (sizes.archive - sizes.masks) // saved + 1
    return [f"{tasks} checkpoints take no more room than their archive; it takes less from {fewest:.0f} such tasks on"]


def build_report(
    planned: PlannedArchive, output: Path | None, measured: Measured | None = None, notes: tuple[str, ...] = ()
) -> CompressReport:
    """Put a plan and what was measured together; without a measurement it is a preview."""
    info, parameters = planned.info, planned.info.parameters
    tasks = []
    for number, task in enumerate(info.tasks):
        density = measured.ones[number] / parameters if measured and parameters else None
        moved = measured is not None and measured.norms[number] > 0
        error = math.sqrt(measured.errors[number] / measured.norms[number]) if measured is not None and moved else None
        tasks.append(TaskFigures(task.name, task.model, task.tall_mask_lambda, model_bytes(planned.cast.tasks[number]), density, error))
    separate = sum(task.bytes for task in tasks)
    sizes = ArchiveSizes(
        archive=sum(file.size for file in planned.layout.files),
        **bytes_by_part(planned),
        separate=separate,
        separate_and_base=separate + model_bytes(planned.cast.reference),
    )
    return CompressReport(
        version=REPORT_VERSION,
        output=str(output) if output else None,
        preview=measured is None,
        base_model=info.base_model,
        vector=info.vector,
        density=list(info.density),
        parameters=parameters,
        tensors=info.tensors,
        copied=[tensor.name for tensor in planned.copied],
        sizes=sizes,
        tasks=tasks,
        files=[{"name": file.name, "bytes": file.size} for file in planned.layout.files],
        seconds=measured.seconds if measured else 0.0,
        bytes_read=planned.bytes_in if measured else 0,
        bytes_written=planned.layout.total_size if measured else 0,
        notes=[*planned.notes, *notes, *_too_few_tasks(sizes, len(tasks))],
        taskloom=info.taskloom,
    )

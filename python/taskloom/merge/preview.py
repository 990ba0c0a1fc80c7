"""What a planned merge will read, write and need: the content of ``--dry-run``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from taskloom.merge.execute import available_threads
from taskloom.merge.planner import PlannedMerge

# Resident memory of the interpreter with the packages of a merge, and one thread's tile of one tensor (float32) in the streaming pass.
_PROCESS = 64 * 2**20
_TILE = 2**20

# Counters of an exact selection by radix: 2**11 of 8 bytes in each of three passes.
_COUNTERS = 3 * 2**11 * 8


@dataclass(frozen=True)
class Preview:
    """A plan in figures: counts, bytes, and an estimate of anonymous memory (inputs are mapped from their files, so not counted)."""

    method: str
    base_model: str | None
    models: list[str]
    tensors_merged: int
    tensors_copied: int
    parameters_merged: int
    bytes_in: int
    bytes_out: int
    anonymous_memory: int
    files: dict[str, int]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The preview as plain types."""
        return asdict(self)


def preview(planned: PlannedMerge, *, method: str, base_model: str | None, threads: int = 0) -> Preview:
    """Sum a plan up without reading any weight."""
    jobs = planned.plan.jobs
    merged = [job for job in jobs if job.stages is not None]
    copies = len(planned.plan.models) + 2
    selecting = any(job.stages is not None and job.stages.select == "magnitude" for job in merged)
    memory = _PROCESS + (threads or available_threads()) * copies * (_TILE + (_COUNTERS if selecting else 0))
    return Preview(
        method=method,
        base_model=base_model,
        models=list(planned.plan.models),
        tensors_merged=len(merged),
        tensors_copied=len(jobs) - len(merged),
        parameters_merged=sum(prod(job.shape) for job in merged),
        bytes_in=planned.bytes_in,
        bytes_out=sum(file.size for file in planned.plan.outputs),
        anonymous_memory=memory,
        files={file.name: file.size for file in planned.plan.outputs},
        notes=list(planned.notes),
    )

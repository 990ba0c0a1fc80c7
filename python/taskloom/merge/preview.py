"""What a planned merge will read, write and need: the content of ``--dry-run``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from taskloom.merge.ceiling import choose_budget
from taskloom.merge.planner import PlannedMerge
from taskloom.merge.shards import parse_size


@dataclass(frozen=True)
class Preview:
    """A plan in figures: counts, bytes, and the most anonymous memory (inputs are mapped from their files, so not counted).

    ``threads`` will be used; ``least_max_ram`` is the lowest ceiling of memory that would do.
    """

    method: str
    base_model: str | None
    models: list[str]
    tensors_merged: int
    tensors_copied: int
    parameters_merged: int
    bytes_in: int
    bytes_out: int
    threads: int
    anonymous_memory: int
    least_max_ram: int
    files: dict[str, int]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The preview as plain types."""
        return asdict(self)


def preview(
    planned: PlannedMerge,
    *,
    method: str,
    base_model: str | None,
    threads: int = 0,
    max_ram: str | int | None = None,
    plot: bool = False,
) -> Preview:
    """Sum a plan up without reading any weight.

    Raises
    ------
    MergeError
        If ``max_ram`` is no size, or too little for this merge.
    """
    jobs = planned.plan.jobs
    merged = [job for job in jobs if job.stages is not None]
    ceiling = None if max_ram is None else parse_size(max_ram, "max_ram")
    budget = choose_budget(planned.plan, threads=threads, max_ram=ceiling, plot=plot)
    return Preview(
        method=method,
        base_model=base_model,
        models=list(planned.plan.models),
        tensors_merged=len(merged),
        tensors_copied=len(jobs) - len(merged),
        parameters_merged=sum(prod(job.shape) for job in merged),
        bytes_in=planned.bytes_in,
        bytes_out=sum(file.size for file in planned.plan.outputs),
        threads=budget.threads,
        anonymous_memory=budget.needed,
        least_max_ram=budget.least,
        files={file.name: file.size for file in planned.plan.outputs},
        notes=[*planned.notes, *budget.notes],
    )

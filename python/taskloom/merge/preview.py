"""What a planned merge will read, write and need: the content of ``--dry-run``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from taskloom.merge.execute import thread_count
from taskloom.merge.plan import TensorJob
from taskloom.merge.planner import PlannedMerge

# Memory of the interpreter with the packages of a merge, and of one thread's pieces of the models and the output.
_PROCESS = 32 * 2**20
_PIECE = 2**20

# Most bytes that the executor keeps of one tensor: magnitudes near a threshold, or a bit per entry that was selected at random.
_KEPT = 64 * 2**20
_SHARE_NEAR_THRESHOLD = 0.06


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


def _kept_bytes(job: TensorJob) -> int:
    """Bytes that the executor keeps of one tensor between its passes over it."""
    stages, entries = job.stages, prod(job.shape) * len(job.tuned)
    if stages is None or stages.select == "all":
        return 0
    if stages.select == "magnitude":
        return min(_KEPT, int(4 * _SHARE_NEAR_THRESHOLD * entries)) if stages.scope == "tensor" else 0
    return min(_KEPT, entries // 8) if stages.rescale == "l1" else 0


def preview(planned: PlannedMerge, *, method: str, base_model: str | None, threads: int = 0) -> Preview:
    """Sum a plan up without reading any weight."""
    jobs = planned.plan.jobs
    merged = [job for job in jobs if job.stages is not None]
    pieces = len(planned.plan.models) + 2
    memory = _PROCESS + thread_count(threads) * pieces * _PIECE + max((_kept_bytes(job) for job in merged), default=0)
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

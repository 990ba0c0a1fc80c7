"""What a merge did, tensor by tensor and in all: kept density, sign conflicts, task vectors' norms and cosines, time and bytes."""

from __future__ import annotations

import importlib
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskloom.merge.identity import FileIdentity
from taskloom.merge.output import write_json
from taskloom.merge.planner import PlannedMerge
from taskloom.merge.shards import PlannedTensor

if TYPE_CHECKING:
    from taskloom.merge.execute import ExecutionResult, TensorStats
    from taskloom.merge.journal import Fingerprint

VERSION = 1


@dataclass(frozen=True)
class Figures:
    """Figures of one tensor or of the whole model; lists have one entry per merged model.

    kept_density
        share of entries that selection keeps, before a sign election.
    conflict_rate
        share of entries where surviving contributions of two models have opposite signs.
    norms
        Euclidean norms of the deltas (of the values where there is no base).
    cosines
        cosine of each pair of deltas; None where one of them is zero.
    """

    kept_density: list[float]
    conflict_rate: float
    norms: list[float | None]
    cosines: list[list[float | None]]


@dataclass(frozen=True)
class TensorReport:
    """One tensor of the output. ``figures`` is None for a tensor that was copied; ``bytes`` counts the output's."""

    name: str
    shape: list[int]
    dtype: str
    layer: int | None
    bytes: int
    seconds: float
    figures: Figures | None


@dataclass(frozen=True)
class FileReport:
    """One file of the output: its name, size, and the xxh3_128 of its content."""

    name: str
    bytes: int
    digest: str


@dataclass(frozen=True)
class InputReport:
    """One file of an input model, as it was when it was read: size, time of its last change, and the xxh3_128 of its header."""

    model: str
    file: str
    bytes: int
    modified_ns: int
    header_digest: str
    sample_digest: str


@dataclass(frozen=True)
class FingerprintReport:
    """Digests of what decides the output besides the inputs: the pinned recipe, and the layout of the files."""

    recipe: str
    layout: str
    allow_nonfinite: bool


@dataclass(frozen=True)
class MergeReport:
    """A finished merge. ``seconds`` counts the streaming pass, ``total`` the figures over all merged tensors."""

    version: int
    output: str
    method: str
    base_model: str | None
    models: list[str]
    seed: int
    seconds: float
    bytes_read: int
    bytes_written: int
    fingerprint: FingerprintReport
    inputs: list[InputReport]
    files: list[FileReport]
    total: Figures
    tensors: list[TensorReport]
    notes: list[str]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain types."""
        return asdict(self)

    @property
    def merge(self) -> Fingerprint:
        """What decided the output: to be compared with another merge's."""
        from taskloom.merge.journal import Fingerprint

        files = {
            item.file: FileIdentity(Path(item.file), item.bytes, item.modified_ns, item.header_digest, item.sample_digest, (0, 0))
            for item in self.inputs
        }
        made = self.fingerprint
        return Fingerprint(self.versions["taskloom"], made.recipe, made.layout, tuple(files.values()), made.allow_nonfinite)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> MergeReport:
        """The inverse of :meth:`to_dict`; raises ValueError, with the field's name, for anything else."""
        from taskloom.merge.read_report import parse_report

        return parse_report(plain)

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        write_json(path, self.to_dict())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _cosine(dots: Sequence[Sequence[float]], first: int, second: int) -> float | None:
    scale = math.sqrt(max(dots[first][first], 0.0)) * math.sqrt(max(dots[second][second], 0.0))
    if not (scale > 0 and math.isfinite(scale) and math.isfinite(dots[first][second])):
        return None
    return 1.0 if first == second else max(-1.0, min(1.0, dots[first][second] / scale))


def _figures(numel: int, kept: Sequence[int], conflicts: int, dots: Sequence[Sequence[float]]) -> Figures:
    models = range(len(dots))
    return Figures(
        kept_density=[count / numel if numel else 0.0 for count in kept],
        conflict_rate=conflicts / numel if numel else 0.0,
        norms=[_finite(math.sqrt(max(dots[model][model], 0.0))) for model in models],
        cosines=[[_cosine(dots, first, second) for second in models] for first in models],
    )


def _sum(values: Iterable[float]) -> float:
    """Exact where the sum is finite; fsum refuses infinities of both signs and sums that overflow."""
    numbers = list(values)
    try:
        return math.fsum(numbers)
    except (ValueError, OverflowError):
        return sum(numbers)


def _total(stats: Sequence[TensorStats], models: int) -> Figures:
    kept = [sum(tensor.kept[model] for tensor in stats) for model in range(models)]
    dots = [[_sum(tensor.dots[row][column] for tensor in stats) for column in range(models)] for row in range(models)]
    return _figures(sum(tensor.numel for tensor in stats), kept, sum(tensor.conflicts for tensor in stats), dots)


def taskloom_version() -> str:
    """The version that was compiled in; importlib.metadata takes longer to import than many a merge takes."""
    version: str = importlib.import_module("taskloom._native").build_info()["version"]
    return version


def build_report(
    planned: PlannedMerge,
    result: ExecutionResult,
    merge: Fingerprint,
    *,
    output: Path,
    method: str,
    base_model: str | None,
    notes: Sequence[str],
) -> MergeReport:
    """Put a plan and what its execution measured together."""
    plan = planned.plan
    stats = {tensor.name: tensor for tensor in result.tensors}
    merged = {job.name for job in plan.jobs if job.stages is not None and job.name in stats}
    tensors = []
    for job in plan.jobs:
        measured = stats.get(job.name)
        figures = None
        if measured is not None and job.name in merged:
            figures = _figures(measured.numel, measured.kept, measured.conflicts, measured.dots)
        tensors.append(
            TensorReport(
                name=job.name,
                shape=list(job.shape),
                dtype=job.target.dtype,
                layer=job.layer,
                bytes=PlannedTensor(job.name, job.target.dtype, job.shape).nbytes,
                seconds=measured.seconds if measured else 0.0,
                figures=figures,
            )
        )
    return MergeReport(
        version=VERSION,
        output=str(output),
        method=method,
        base_model=base_model,
        models=list(plan.models),
        seed=plan.seed,
        seconds=result.seconds,
        bytes_read=result.bytes_read,
        bytes_written=result.bytes_written,
        fingerprint=FingerprintReport(merge.recipe, merge.layout, merge.allow_nonfinite),
        inputs=[
            InputReport(model.label, str(item.file), item.size, item.modified_ns, item.header_digest, item.sample_digest)
            for model in planned.cast.models
            for item in model.files
        ],
        files=[FileReport(file.name, file.bytes, file.digest) for file in result.files],
        total=_total([stats[name] for name in stats if name in merged], len(plan.models) if merged else 0),
        tensors=tensors,
        notes=list(notes),
        versions={"taskloom": merge.taskloom, "python": platform.python_version()},
    )

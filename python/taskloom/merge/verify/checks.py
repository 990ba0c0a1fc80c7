"""Checks of a merge's files that need no arithmetic: what is there, what its report says of it, and whether its inputs are as they were."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from taskloom.merge.checkpoint import Checkpoint, open_checkpoint
from taskloom.merge.digest import file_digest
from taskloom.merge.errors import CheckpointError, ReportError
from taskloom.merge.locate import Located
from taskloom.merge.output import INDEX, RECIPE, REPORT
from taskloom.merge.plan import TensorJob
from taskloom.merge.read_report import load_report
from taskloom.merge.recipe import Recipe
from taskloom.merge.report import MergeReport
from taskloom.merge.verify.report import Check


def checked(name: str, problems: Sequence[str], passed: str) -> Check:
    """A check that failed where there are problems, else passed."""
    return Check(name, "failed" if problems else "passed", "" if problems else passed, list(problems))


def skipped(name: str, reason: str) -> Check:
    """A check that could not be made, and why."""
    return Check(name, "skipped", reason, [])


def open_output(out: Path) -> tuple[Checkpoint | None, Check]:
    """The output's tensors, and whether its safetensors files and their index are whole and fit each other."""
    try:
        opened = open_checkpoint(Located(str(out), out))
    except CheckpointError as error:
        return None, checked("files", [str(error)], "")
    problems = []
    known = {identity.file.name for identity in opened.files}
    strangers = sorted({path.name for path in out.glob("*.safetensors")} - known)
    if strangers:
        problems.append(f"{', '.join(strangers)} does not belong to the model")
    index = out / INDEX
    if index.is_file():
        if known == {"model.safetensors"}:
            problems.append(f"{INDEX} is there although the model is one file")
        problems += _index_problems(index, sum(entry.nbytes for entry in opened.tensors.values()))
    return opened, checked("files", problems, f"{len(known)} safetensors files, whole")


def _index_problems(index: Path, total: int) -> list[str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{index.name} cannot be read: {error}"]
    metadata = content.get("metadata") if isinstance(content, dict) else None
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    return [] if said == total else [f"{index.name}: total_size is {said!r}, the tensors have {total} bytes"]


def fits(opened: Checkpoint, job: TensorJob) -> bool:
    """Whether the output has a job's tensor in its dtype and shape."""
    entry = opened.tensors.get(job.name)
    return entry is not None and (entry.dtype, entry.shape) == (job.target.dtype, job.shape)


def check_tensors(opened: Checkpoint, jobs: Sequence[TensorJob]) -> Check:
    """Whether the output has the tensors of the plan, in their dtypes and shapes, and no others."""
    problems = []
    wanted = {job.name: job for job in jobs}
    for name, job in wanted.items():
        entry = opened.tensors.get(name)
        if entry is None:
            problems.append(f"tensor {name!r} is missing")
        elif not fits(opened, job):
            problems.append(f"tensor {name!r} is {entry.dtype} {list(entry.shape)}, expected {job.target.dtype} {list(job.shape)}")
    problems += [f"tensor {name!r} does not belong to the merge" for name in opened.tensors if name not in wanted]
    return checked("tensors", problems, f"{len(wanted)} tensors with the dtypes and shapes of the recipe")


def read_report(out: Path) -> tuple[MergeReport | None, Check | None]:
    """The output's merge_report.json; a check where there is none to be read."""
    path = out / REPORT
    if not path.exists():
        return None, skipped("report", f"{REPORT} is not there")
    try:
        return load_report(path), None
    except ReportError as error:
        return None, checked("report", [f"{REPORT} cannot be read: {error}"], "")


def check_report(report: MergeReport, recipe: Recipe) -> Check:
    """Whether the recipe beside the weights is the one that the report is of."""
    import xxhash

    problems = []
    seed = recipe.seed or 0
    if report.method != recipe.method.name:
        problems.append(f"{RECIPE} merges by {recipe.method.name}, the report is of {report.method}")
    if report.seed != seed:
        problems.append(f"{RECIPE} has the seed {seed}, the report {report.seed}")
    if not problems and xxhash.xxh3_128(recipe.text.encode()).hexdigest() != report.fingerprint.recipe:
        problems.append(f"{RECIPE} has changed since the merge")
    return checked("report", problems, f"{RECIPE} is the recipe of the report")


def check_digests(report: MergeReport, out: Path, progress: Callable[[int, int], None] | None) -> Check:
    """Whether the files' sizes and contents are those that the report has."""
    problems = []
    recorded = {file.name for file in report.files}
    done, total = 0, sum(file.bytes for file in report.files)
    problems += [f"{path.name} is not in the report" for path in sorted(out.glob("*.safetensors")) if path.name not in recorded]
    for file in report.files:
        path = out / file.name
        try:
            size = path.stat().st_size
            if size != file.bytes:
                problems.append(f"{file.name} has {size} bytes, the report {file.bytes}")
            elif file_digest(path) != file.digest:
                problems.append(f"{file.name} has changed since the merge (its xxh3_128 is not {file.digest})")
        except OSError as error:
            problems.append(f"{file.name} cannot be read: {error.strerror}")
        done += file.bytes
        if progress is not None:
            progress(done, total)
    return checked("digests", problems, f"{len(report.files)} safetensors files as they were written (xxh3_128)")


def check_inputs(report: MergeReport, models: Sequence[Checkpoint]) -> tuple[Check, list[str]]:
    """Whether the inputs' files are those of the report: sizes, headers, sampled blocks; and a note on those that were written to since."""
    found = [(model.label, identity) for model in models for identity in model.files]
    if len(found) != len(report.inputs):
        return checked("inputs", [f"the models have {len(found)} files, the merge read {len(report.inputs)}"], ""), []
    problems, touched = [], []
    for (_, now), then in zip(found, report.inputs, strict=True):
        if now.size != then.bytes:
            problems.append(f"{now.file} has {now.size} bytes, {then.bytes} when it was merged")
        elif now.header_digest != then.header_digest:
            problems.append(f"{now.file} has another header than when it was merged")
        elif now.sample_digest != then.sample_digest:
            problems.append(f"{now.file} has other weights than when it was merged")
        elif now.modified_ns != then.modified_ns:
            touched.append(str(now.file))
    notes = [f"written to since the merge, with the same size, header and sampled blocks: {', '.join(touched)}"] if touched else []
    return checked("inputs", problems, f"{len(found)} files of {len(models)} models, sizes, headers and sampled blocks as merged"), notes

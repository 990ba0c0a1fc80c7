"""A whole verification: the files of a merge, and its tensors computed again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch

from taskloom.merge.checkpoint import Checkpoint
from taskloom.merge.errors import MergeError
from taskloom.merge.header import FLOATING, TensorEntry
from taskloom.merge.output import RECIPE
from taskloom.merge.patterns import matching_names
from taskloom.merge.plan import TensorJob
from taskloom.merge.planner import PlannedMerge, open_models, plan_merge
from taskloom.merge.recipe import Recipe, load_recipe
from taskloom.merge.report import MergeReport
from taskloom.merge.verify.checks import (
    check_digests,
    check_inputs,
    check_report,
    check_tensors,
    checked,
    fits,
    open_output,
    read_report,
    skipped,
)
from taskloom.merge.verify.compare import Comparison
from taskloom.merge.verify.reader import TensorReader
from taskloom.merge.verify.recompute import Recomputation, is_bit_exact
from taskloom.merge.verify.report import Check, FirstWrong, TensorCheck, VerifyReport
from taskloom.merge.verify.sample import choose, output_bytes

_COPY_PIECE = 1 << 24

Progress = Callable[[str, int, int], None]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _shown(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _compare_bytes(job: TensorJob, planned: PlannedMerge, entry: TensorEntry, reader: TensorReader) -> TensorCheck:
    """A copy in the same dtype: every byte."""
    source = job.base
    if source is None:
        raise MergeError(f"tensor {job.name!r} is copied from nothing")
    differing, first = 0, None
    for begin in range(0, entry.nbytes, _COPY_PIECE):
        count = min(_COPY_PIECE, entry.nbytes - begin)
        got = reader.read_bytes(entry.file, entry.offset + begin, count)
        wanted = reader.read_bytes(planned.plan.inputs[source.file], source.offset + begin, count)
        places = (got != wanted).nonzero().squeeze(1)
        differing += len(places)
        if first is None and len(places):
            place = int(places[0])
            first = FirstWrong(begin + place, int(got[place]), int(wanted[place]))
    return TensorCheck(
        name=job.name,
        shape=list(job.shape),
        dtype=job.target.dtype,
        kind="copied",
        criterion="bits",
        ok=differing == 0,
        entries=prod(job.shape),
        differing=differing,
        wrong=differing,
        max_abs=None,
        max_ulp=None,
        relative_norm=None,
        first_wrong=first,
    )


def _compare_values(job: TensorJob, entry: TensorEntry, reader: TensorReader, recomputation: Recomputation) -> TensorCheck:
    """A merged tensor, or one that was copied into another dtype: every entry."""
    comparison = Comparison()
    for expected in recomputation.expected(job) if job.stages is not None else recomputation.converted(job):
        got = reader.read(entry.file, entry.offset, entry.dtype, expected.begin, expected.values.numel())
        comparison.add(got, expected)
    first = None
    if comparison.first_wrong is not None:
        index, found, wanted = comparison.first_wrong
        first = FirstWrong(index, _shown(found), _shown(wanted))
    return TensorCheck(
        name=job.name,
        shape=list(job.shape),
        dtype=job.target.dtype,
        kind="copied" if job.stages is None else "merged",
        criterion="bits" if is_bit_exact(job) else "rounding",
        ok=comparison.wrong == 0,
        entries=comparison.entries,
        differing=comparison.differing,
        wrong=comparison.wrong,
        max_abs=_finite(comparison.max_abs),
        max_ulp=_finite(comparison.max_ulp),
        relative_norm=_finite(comparison.relative_norm),
        first_wrong=first,
    )


def _compare(
    planned: PlannedMerge, opened: Checkpoint, jobs: Sequence[TensorJob], reader: TensorReader, progress: Progress | None
) -> list[TensorCheck]:
    recomputation = Recomputation(planned.plan, reader)
    passes = recomputation.prepared_entries(jobs)
    recomputation.prepare(jobs, None if progress is None else lambda done: progress("thresholds", done, passes))
    done, total = 0, sum(map(output_bytes, jobs))
    results = []
    for job in jobs:
        entry = opened.tensors[job.name]
        copied = job.stages is None and job.base is not None and (job.base.dtype == entry.dtype or entry.dtype not in FLOATING)
        if copied:
            results.append(_compare_bytes(job, planned, entry, reader))
        else:
            results.append(_compare_values(job, entry, reader, recomputation))
        done += output_bytes(job)
        if progress is not None:
            progress("tensors", done, total)
    return results


@contextmanager
def _one_thread() -> Iterator[None]:
    """Pieces are too small for torch's threads, which wait for each other many times as long on a machine that is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _value_problem(tensor: TensorCheck) -> str:
    what = f"tensor {tensor.name!r}: {tensor.wrong} of {tensor.entries} entries are wrong"
    if tensor.first_wrong is None:
        return what
    first = tensor.first_wrong
    return f"{what}, first at {first.index}: {first.found}, expected {first.expected}"


def _opened_recipe(out: Path) -> Recipe:
    if not out.is_dir():
        raise MergeError(f"{out}: is not a folder, expected the output of a merge")
    if not (out / RECIPE).is_file():
        raise MergeError(
            f"{out}: holds no {RECIPE}, so it cannot be told how it was merged; only outputs of taskloom merge can be verified"
        )
    return load_recipe(out / RECIPE)


def _planned(recipe: Recipe) -> PlannedMerge | MergeError:
    """The plan of the recipe, or why there is none: a model that is missing, damaged or changed."""
    try:
        # Where tensors were put is read from the output, so the size of its files does not matter.
        return plan_merge(recipe, open_models(recipe), shard_size=2**62, seed=recipe.seed or 0, allow_nonfinite=True)
    except MergeError as error:
        return error


def _check_report(out: Path, recipe: Recipe) -> tuple[MergeReport | None, Check]:
    report, unreadable = read_report(out)
    if report is not None:
        return report, check_report(report, recipe)
    return None, unreadable or skipped("report", "there is none")


def _check_digests(report: MergeReport | None, out: Path, wanted: bool, progress: Progress | None) -> Check:
    if not wanted:
        return skipped("digests", "not asked for")
    if report is None:
        return skipped("digests", "no report to compare with")
    return check_digests(report, out, None if progress is None else lambda done, total: progress("digests", done, total))


def _check_inputs(report: MergeReport | None, planned: PlannedMerge | MergeError) -> tuple[Check, list[str]]:
    if isinstance(planned, MergeError):
        return checked("inputs", [str(planned)], ""), []
    if report is None:
        return skipped("inputs", "no report to compare with"), []
    return check_inputs(report, planned.cast.models)


def _equal(tensors: Sequence[TensorCheck]) -> str:
    by_bits = sum(result.criterion == "bits" for result in tensors)
    return f"{by_bits} tensors equal to the bit" + (f", {len(tensors) - by_bits} within rounding" if by_bits < len(tensors) else "")


def verify_merge(
    out: str | Path,
    *,
    sample: float = 0.05,
    seed: int = 0,
    tensor: str | None = None,
    digests: bool = True,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check a finished merge: its files, and a sample of its tensors (or all) computed again with the reference in plain torch.

    Nothing of the compiled executor is used. Tensors are taken in pieces, so that memory does not depend on their size; only
    selection by row (``della``, ``scope: row``) holds whole rows.

    Parameters
    ----------
    out
        Output of ``taskloom merge``, with its ``taskloom_recipe.yml``; the models that it pins must be there.
    sample
        Share of the output's bytes that is computed again, 0 < sample <= 1.
    seed
        Of the choice of the sample.
    tensor
        Glob; only tensors whose whole name matches it are candidates.
    digests
        Also read every output file whole and compare its xxh3_128 with the report's.
    progress
        Called now and then with what is done (``digests``, ``thresholds``, ``tensors``), how much of it, and of how much.

    Returns
    -------
    VerifyReport
        ``ok`` tells; ``problems`` says what is wrong.

    Raises
    ------
    MergeError
        If ``out`` is no merge's output, its recipe cannot be read, or nothing matches ``tensor``.
    """
    if not 0 < sample <= 1:
        raise MergeError(f"sample: expected 0 < sample <= 1, got {sample}")
    start = time.perf_counter()
    folder = Path(out)
    recipe = _opened_recipe(folder)
    opened, files = open_output(folder)
    report, of_report = _check_report(folder, recipe)
    planned = _planned(recipe)
    candidates = None if isinstance(planned, MergeError) else set(matching_names((job.name for job in planned.plan.jobs), tensor))
    inputs, notes = _check_inputs(report, planned)
    checks = [files, of_report, _check_digests(report, folder, digests, progress), inputs]
    tensors: list[TensorCheck] = []
    if isinstance(planned, MergeError) or candidates is None:
        checks += [skipped(name, "the models cannot be read") for name in ("tensors", "values")]
    elif opened is None:
        checks += [skipped(name, "the output's files cannot be read") for name in ("tensors", "values")]
    else:
        fitting = [job for job in planned.plan.jobs if job.name in candidates and fits(opened, job)]
        chosen = choose(fitting, sample, seed) if sample < 1 and fitting else fitting
        with TensorReader() as reader, _one_thread():
            tensors = _compare(planned, opened, chosen, reader, progress)
        planned.check_inputs()
        checks.append(check_tensors(opened, planned.plan.jobs))
        checks.append(checked("values", [_value_problem(result) for result in tensors if not result.ok], _equal(tensors)))
    return VerifyReport(
        output=str(folder),
        ok=all(check.status != "failed" for check in checks),
        method=recipe.method.name,
        seed=recipe.seed or 0,
        problems=[f"{check.name}: {problem}" for check in checks for problem in check.problems],
        checks=checks,
        tensors=tensors,
        verified_tensors=len(tensors),
        of_tensors=0 if isinstance(planned, MergeError) else len(planned.plan.jobs),
        verified_bytes=sum(entry.nbytes for entry in (opened.tensors[result.name] for result in tensors if opened is not None)),
        of_bytes=0 if isinstance(planned, MergeError) else planned.plan.total_size,
        sample_seed=seed if sample < 1 else None,
        notes=notes,
        seconds=time.perf_counter() - start,
    )

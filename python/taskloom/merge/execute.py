"""Carries out a plan with the compiled executor, and merges tensors in memory with the same one."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from taskloom.merge.errors import MergeError
from taskloom.merge.header import BITS, tensor_bytes
from taskloom.merge.plan import MergePlan, TensorJob

# Above any machine's cores a thread only costs memory.
_MOST_THREADS = 1024


@dataclass(frozen=True)
class TensorStats:
    """What the executor counted in one merged tensor.

    Attributes
    ----------
    name, numel
        The tensor.
    kept
        Entries that selection keeps, per task.
    conflicts
        Entries where kept, weighted entries of two tasks have opposite signs.
    dots
        Inner products of the tasks' deltas; the diagonal holds squared norms. With more than 8 tasks the other entries are estimated
        from evenly spaced blocks of 512 entries.
    seconds
        Wall time of this tensor.
    magnitude_histogram
        Per task, counts of ``|delta|`` by float32 exponent field (256 bins), where it was asked for.
    """

    name: str
    numel: int
    kept: list[int]
    conflicts: int
    dots: list[list[float]]
    seconds: float
    magnitude_histogram: list[list[int]] | None


@dataclass(frozen=True)
class ExecutionResult:
    """A finished pass: figures of every merged tensor (not of copies), wall seconds, and bytes of tensors read and written."""

    tensors: list[TensorStats]
    seconds: float
    bytes_read: int
    bytes_written: int


def available_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_count(asked: int) -> int:
    """Threads that a merge takes where so many were asked for; 0 means all cores."""
    return min(asked or available_threads(), _MOST_THREADS)


def _bytes_read(job: TensorJob) -> int:
    return sum(tensor_bytes(source.dtype, job.shape) for source in (job.base, *job.tuned) if source is not None)


def run_native(
    plan: MergePlan,
    inputs: list[Any],
    outputs: list[Any],
    *,
    threads: int,
    magnitude_histogram: bool,
    progress: Callable[[int], None] | None,
) -> ExecutionResult:
    """Run the executor on inputs and outputs given as it takes them: paths and (path, header, size), or 0 for memory."""
    native = importlib.import_module("taskloom._native")
    start = time.perf_counter()
    team = thread_count(threads)
    try:
        results = native.execute_merge(inputs, outputs, plan, BITS, team, magnitude_histogram, progress)
    except (RuntimeError, ValueError) as error:
        raise MergeError(str(error)) from error
    except MemoryError as error:
        raise MergeError(f"not enough memory for the buffers of {team} threads") from error
    tensors = [
        TensorStats(
            name=job.name,
            numel=prod(job.shape),
            kept=result["kept"],
            conflicts=result["conflicts"],
            dots=result["dots"],
            seconds=result["seconds"],
            magnitude_histogram=result["magnitude_histogram"] or None,
        )
        for job, result in zip(plan.jobs, results, strict=True)
        if result is not None and len(result["kept"]) == len(job.tuned)
    ]
    return ExecutionResult(
        tensors=tensors,
        seconds=time.perf_counter() - start,
        bytes_read=sum(_bytes_read(job) for job in plan.jobs),
        bytes_written=plan.total_size,
    )


def execute_plan(
    plan: MergePlan,
    folder: Path,
    *,
    threads: int = 0,
    magnitude_histogram: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ExecutionResult:
    """Create the plan's output files in ``folder``, with every tensor in them, in one streaming pass.

    Parameters
    ----------
    plan
        From :func:`taskloom.merge.planner.plan_merge`.
    folder
        Existing folder without files of the outputs' names.
    threads
        Threads, the calling one included; 0 means all cores. The result does not depend on it.
    magnitude_histogram
        Count ``|delta|`` by exponent as well (one more pass).
    progress
        Called from the calling thread now and then, and at the end, with the number of tensor bytes done, read and written together.

    Raises
    ------
    MergeError
        If an input holds NaN or infinity and the plan does not allow them, or a file cannot be read or written.
    """
    inputs = [str(path) for path in plan.inputs]
    outputs = [(str(folder / output.name), output.header, output.size) for output in plan.outputs]
    return run_native(plan, inputs, outputs, threads=threads, magnitude_histogram=magnitude_histogram, progress=progress)

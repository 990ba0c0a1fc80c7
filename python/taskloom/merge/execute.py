"""Carries out a plan with the compiled executor, and merges tensors in memory with the same one."""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

from taskloom.merge.digest import file_digest
from taskloom.merge.errors import MergeError, OutputError
from taskloom.merge.header import BITS, tensor_bytes
from taskloom.merge.plan import MergePlan, TensorJob

# Above any machine's cores a thread only costs memory.
_MOST_THREADS = 1024
_STACK = 2**20


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

    def fits(self, models: int) -> bool:
        """Whether the figures are of so many models."""

        def numbers(values: Any) -> bool:
            return isinstance(values, list) and len(values) == models and all(isinstance(value, int | float) for value in values)

        rows = isinstance(self.dots, list) and len(self.dots) == models and all(map(numbers, self.dots))
        return numbers(self.kept) and rows and isinstance(self.conflicts, int) and isinstance(self.numel, int)


@dataclass(frozen=True)
class FinishedFile:
    """An output file that is complete and on the disk.

    Attributes
    ----------
    name, bytes, digest
        File name, size, and xxh3_128 of the content.
    seconds
        Wall time of its merge.
    tensors
        Figures of its merged tensors, in plan order.
    """

    name: str
    bytes: int
    digest: str
    seconds: float
    tensors: tuple[TensorStats, ...]

    @property
    def has_histograms(self) -> bool:
        """Whether magnitudes were counted in all of its merged tensors."""
        return all(tensor.magnitude_histogram is not None for tensor in self.tensors)

    def fits(self, jobs: Sequence[TensorJob]) -> bool:
        """Whether its figures are those of these jobs' merged tensors, as far as their kinds and numbers go."""
        merged = [job for job in jobs if job.stages is not None and prod(job.shape) > 0]
        figures = {tensor.name: tensor for tensor in self.tensors}
        return all(job.name in figures and figures[job.name].fits(len(job.tuned)) for job in merged)

    def is_at(self, path: Path) -> bool:
        """Whether the file at ``path`` is still this one."""
        try:
            return path.stat().st_size == self.bytes and file_digest(path) == self.digest
        except OSError:
            return False


@dataclass(frozen=True)
class ExecutionResult:
    """A finished pass: its files in plan order, and bytes of tensors read and written."""

    files: tuple[FinishedFile, ...]
    bytes_read: int
    bytes_written: int

    @property
    def tensors(self) -> list[TensorStats]:
        """Figures of every merged tensor (not of copies)."""
        return [tensor for file in self.files for tensor in file.tensors]

    @property
    def seconds(self) -> float:
        """Wall time of the merge."""
        return sum(file.seconds for file in self.files)


def available_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_count(asked: int) -> int:
    """Threads that a merge takes where so many were asked for; 0 means all cores."""
    return min(asked or available_threads(), _MOST_THREADS)


def _bytes_read(job: TensorJob) -> int:
    return sum(tensor_bytes(source.dtype, job.shape) for source in (job.base, *job.tuned) if source is not None)


def _job_bytes(job: TensorJob) -> int:
    return _bytes_read(job) + tensor_bytes(job.target.dtype, job.shape)


class FileExecutor(Protocol):
    """Makes the output files of a plan, one at a time."""

    def reserve(self, outputs: Sequence[int]) -> None:
        """Create output files with their room on the disk."""

    def run(self, output: int, progress: Callable[[int], None] | None = None) -> tuple[TensorStats, ...]:
        """Merge one output's tensors into its file, and return the figures of the merged ones."""

    def close(self) -> None:
        """Give back what the executor holds."""


class Executor:
    """The compiled executor of a plan, on inputs and outputs as it takes them: paths and (path, header, size), or 0 for memory.

    Raises
    ------
    MergeError
        If an input cannot be opened.
    """

    def __init__(
        self, plan: MergePlan, inputs: list[Any], outputs: list[Any], *, threads: int, magnitude_histogram: bool, room: int | None = None
    ) -> None:
        self._native = importlib.import_module("taskloom._native")
        self._threads = thread_count(threads)
        self._jobs: list[list[TensorJob]] = [[] for _ in outputs]
        for job in plan.jobs:
            self._jobs[job.target.file].append(job)
        self._merge = self._guarded(
            lambda: self._native.MergeExecutor(
                inputs, outputs, plan, BITS, self._threads, magnitude_histogram, self._native.default_room if room is None else room
            ),
        )

    def _guarded(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except self._native.MergeFailure as error:
            raise MergeError(str(error)) from error
        except MemoryError as error:
            raise MergeError(f"not enough memory for the buffers of {self._threads} threads") from error

    def close(self) -> None:
        """Nothing: what is held goes with the executor."""

    def reserve(self, outputs: Sequence[int]) -> None:
        """Create output files with their room on the disk; raises MergeError where that is not to be had."""
        self._guarded(lambda: self._merge.reserve(outputs))

    def run(self, output: int, progress: Callable[[int], None] | None = None) -> tuple[TensorStats, ...]:
        """Merge one output's tensors; raises MergeError where a file cannot be read or written, or values are not finite."""
        results = self._guarded(lambda: self._merge.run(output, progress))
        return tuple(
            TensorStats(
                name=job.name,
                numel=prod(job.shape),
                kept=result["kept"],
                conflicts=result["conflicts"],
                dots=result["dots"],
                seconds=result["seconds"],
                magnitude_histogram=result["magnitude_histogram"] or None,
            )
            for job, result in zip(self._jobs[output], results, strict=True)
            if result is not None and len(result["kept"]) == len(job.tuned)
        )


def jobs_by_file(plan: MergePlan) -> dict[str, list[TensorJob]]:
    """The jobs of each output file, by the file's name."""
    found: dict[str, list[TensorJob]] = {output.name: [] for output in plan.outputs}
    for job in plan.jobs:
        found[plan.outputs[job.target.file].name].append(job)
    return found


class _Finisher:
    """Digests and syncs a file in a thread of its own while the next one is merged; one at a time, so that unwritten data stays bounded."""

    def __init__(self, finished: Callable[[FinishedFile], None]) -> None:
        self._finished = finished
        # Not Thread.join, which in some versions of Python takes a thread for ended when it is interrupted itself.
        self._idle = threading.Event()
        self._idle.set()
        self._error: BaseException | None = None

    def start(self, path: Path, size: int, seconds: float, tensors: tuple[TensorStats, ...]) -> None:
        self.wait()
        idle = threading.Event()
        thread = threading.Thread(target=self._finish, args=(path, size, seconds, tensors, idle), name=f"finish {path.name}")
        # The system's usual 8 MiB of stack would count against limits of address space.
        usual = threading.stack_size(_STACK)
        try:
            thread.start()
        finally:
            threading.stack_size(usual)
        self._idle = idle

    def _finish(self, path: Path, size: int, seconds: float, tensors: tuple[TensorStats, ...], idle: threading.Event) -> None:
        try:
            # First, because the disk is writing meanwhile.
            digest = file_digest(path)
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            self._finished(FinishedFile(path.name, size, digest, seconds, tensors))
        except OSError as error:
            self._error = OutputError(f"{path}: cannot be finished: {error.strerror}")
            self._error.__cause__ = error
        finally:
            idle.set()

    def join(self) -> None:
        """Wait for the thread, come what may: it writes to what the caller would take away."""
        interruption: BaseException | None = None
        while not self._idle.is_set():
            try:
                self._idle.wait()
            except KeyboardInterrupt as error:
                interruption = error
        if interruption is not None:
            raise interruption

    def wait(self) -> None:
        self.join()
        if self._error is not None:
            raise self._error


def execute_plan(
    plan: MergePlan,
    folder: Path,
    *,
    threads: int = 0,
    room: int | None = None,
    magnitude_histogram: bool = False,
    progress: Callable[[int], None] | None = None,
    finished: Mapping[str, FinishedFile] | None = None,
    on_finished: Callable[[FinishedFile], None] | None = None,
    check_inputs: Callable[[], None] | None = None,
    make_executor: Callable[[list[tuple[str, bytes, int]]], FileExecutor] | None = None,
) -> ExecutionResult:
    """Create the plan's output files in ``folder``, with every tensor in them, in one streaming pass.

    Parameters
    ----------
    plan
        From :func:`taskloom.merge.planner.plan_merge`.
    folder
        Existing folder without files of the outputs' names, but for those in ``finished``.
    threads
        Threads, the calling one included; 0 means all cores. The result does not depend on it.
    room
        Most bytes that the executor keeps between its passes over a tensor (None: 64 MiB); the result does not depend on it.
    magnitude_histogram
        Count ``|delta|`` by exponent as well (one more pass).
    progress
        Called from the calling thread now and then, and at the end, with the number of tensor bytes done, read and written together.
    finished
        Files that are there already, by name; they are left as they are.
    on_finished
        Called for each new file once it is on the disk, from another thread, one file at a time.
    check_inputs
        Called after each file, before it counts as finished; raises where an input has changed.
    make_executor
        Makes the executor from (path, header, size) of each output; None takes the compiled one, with ``threads`` and ``room``.

    Raises
    ------
    MergeError
        If an input holds NaN or infinity and the plan does not allow them, or a file cannot be read or written.
    """
    done = dict(finished or {})
    wanted = [index for index, output in enumerate(plan.outputs) if output.name not in done]
    outputs = [(str(folder / output.name), output.header, output.size) for output in plan.outputs]
    executor: FileExecutor
    if make_executor is not None:
        executor = make_executor(outputs)
    else:
        inputs = [str(path) for path in plan.inputs]
        executor = Executor(plan, inputs, outputs, threads=threads, magnitude_histogram=magnitude_histogram, room=room)

    def finish(file: FinishedFile) -> None:
        if on_finished is not None:
            on_finished(file)
        done[file.name] = file

    skipped = sum(_job_bytes(job) for job in plan.jobs if plan.outputs[job.target.file].name in done)
    shifted = None if progress is None else lambda count: progress(skipped + count)
    finisher = _Finisher(finish)
    try:
        executor.reserve(wanted)
        for index in wanted:
            start = time.perf_counter()
            stats = executor.run(index, shifted)
            seconds = time.perf_counter() - start
            if check_inputs is not None:
                check_inputs()
            finisher.start(folder / plan.outputs[index].name, plan.outputs[index].size, seconds, stats)
    finally:
        try:
            executor.close()
        finally:
            finisher.join()
    finisher.wait()
    return ExecutionResult(
        files=tuple(done[output.name] for output in plan.outputs),
        bytes_read=sum(_bytes_read(job) for job in plan.jobs),
        bytes_written=plan.total_size,
    )

"""The executor of a plan on a device; what it offers, writes and refuses is what :class:`taskloom.merge.execute.Executor` does."""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any

import torch

from taskloom.merge.device.accelerator import Accelerator, of_a_device
from taskloom.merge.device.account import DeviceBudget
from taskloom.merge.device.files import InputFiles
from taskloom.merge.device.findings import Findings
from taskloom.merge.device.model import ModelFacts
from taskloom.merge.device.pipeline import Load, Memory, Pipeline, Source
from taskloom.merge.device.search import Look, find_facts
from taskloom.merge.device.tensors import merge_tensors
from taskloom.merge.errors import MergeError
from taskloom.merge.execute import TensorStats
from taskloom.merge.plan import MergePlan, TensorJob


class DeviceExecutor:
    """Carries a plan out on a device, one output file at a time.

    Parameters
    ----------
    plan
        What to do.
    outputs
        (path, header, size) of each output file.
    accelerator, budget
        The device, and the memory that it gives.
    magnitude_histogram
        Count magnitudes by exponent.
    readers
        Threads that read, at most one per pinned buffer.
    source
        Reads the inputs; None opens the plan's files.

    Raises
    ------
    MergeError
        If an input cannot be opened, or the device has not the memory.
    """

    def __init__(
        self,
        plan: MergePlan,
        outputs: Sequence[tuple[str, bytes, int]],
        *,
        accelerator: Accelerator,
        budget: DeviceBudget,
        magnitude_histogram: bool = False,
        readers: int = 2,
        source: Source | None = None,
    ) -> None:
        self._native: Any = importlib.import_module("taskloom._native")
        self._plan = plan
        self._accelerator = accelerator
        self._magnitude_histogram = magnitude_histogram
        self._open = ExitStack()
        self._readers = min(readers, budget.pieces_in)
        self._taken: Memory | None = None
        self._facts: ModelFacts | None = None
        self._outputs = [self._native.OutputFile(*output) for output in outputs]
        self._jobs: list[list[TensorJob]] = [[] for _ in outputs]
        for job in plan.jobs:
            self._jobs[job.target.file].append(job)
        self._done = 0
        self._counting = threading.Lock()
        self._progress: Callable[[int], None] | None = None
        try:
            if source is None:
                files = InputFiles(plan.inputs)
                self._open.callback(files.close)
                source = files
            self._source = source
            self._findings = Findings(plan, source, budget.piece)
            self._open.enter_context(accelerator.limited(budget.needed))
            self._open.callback(self._wait)
            with self._guarded(None):
                self._taken = Memory(accelerator, budget)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the inputs and give the device's memory back; nothing can be run afterwards."""
        try:
            self._open.close()
        finally:
            self._taken = None

    def _wait(self) -> None:
        """Wait for the device; where a failure is on its way already, a device that fails again must not take its place."""
        try:
            self._accelerator.synchronize()
        except RuntimeError as error:
            if error.__context__ is None:
                raise

    @property
    def _memory(self) -> Memory:
        if self._taken is None:
            raise ValueError("the executor is closed")
        return self._taken

    @contextmanager
    def _guarded(self, job: TensorJob | None) -> Iterator[None]:
        """Says by a MergeError where memory ran out, and what the compiled side could not write."""
        where = "" if job is None else f" at tensor {job.name!r}"
        try:
            yield
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            raise MergeError(f"device {self._accelerator.device}: ran out of memory{where}: {reason}") from error
        except self._native.MergeFailure as error:
            raise MergeError(str(error)) from error
        except RuntimeError as error:
            if not of_a_device(error):
                raise
            # Kernels run behind the calls that launched them, so an earlier tensor's may be the one that failed.
            reason = str(error).splitlines()[0]
            raise MergeError(f"device {self._accelerator.device}: failed{where} or shortly before: {reason}") from error

    def reserve(self, outputs: Sequence[int]) -> None:
        """Create output files with their room on the disk; raises MergeError where that is not to be had."""
        with self._guarded(None):
            for output in outputs:
                self._outputs[output].reserve()

    def run(self, output: int, progress: Callable[[int], None] | None = None) -> tuple[TensorStats, ...]:
        """Merge one output's tensors; raises MergeError where a file cannot be read or written, or values are not finite."""
        self._progress = progress
        file = self._outputs[output]
        stats: list[TensorStats] = []
        with self._guarded(None), torch.no_grad():
            file.open()
            facts = self._prepared()
            pipeline = Pipeline(
                self._memory,
                self._source,
                lambda load: self._merge(load, facts),
                readers=self._readers,
                target=file,
                finish=lambda load, written: self._finish(load, written, stats),
                count=self._count,
                tick=self._tick,
            )
            pipeline.run(self._jobs[output])
            file.close()
        self._tick()
        return tuple(stats)

    def _count(self, count: int) -> None:
        with self._counting:
            self._done += count

    def _tick(self) -> None:
        if self._progress is not None:
            self._progress(self._done)

    def _merge(self, load: Load, facts: ModelFacts) -> None:
        if load.out is None:
            return
        with self._guarded(load.job):
            figures = merge_tensors(
                load.job, self._plan.seed, load.base, load.tuned, load.out, facts, magnitude_histogram=self._magnitude_histogram
            )
            self._findings.take(load.job, figures, self._accelerator)

    def _finish(self, load: Load, written: bool, stats: list[TensorStats]) -> None:
        """In the writing thread: refuse what is not finite before it is written; note the figures of what is."""
        job = load.job
        if not written:
            self._findings.check(job)
        elif job.stages is not None and prod(job.shape) > 0:
            stats.append(self._findings.stats(job, time.perf_counter() - load.began))
        else:
            self._findings.forget(job)

    def _prepared(self) -> ModelFacts:
        """What must be known of the whole model: found before the first output, from all jobs."""
        if self._facts is None:
            with self._accelerator.lane("merge"):
                self._facts = find_facts(self._plan, self._visit, self._accelerator.device)
        return self._facts

    def _visit(self, jobs: Sequence[TensorJob], look: Look) -> None:
        def merge(load: Load) -> None:
            if load.out is not None:
                with self._guarded(load.job):
                    look(load.job, load.base, load.tuned, load.out)

        Pipeline(self._memory, self._source, merge, readers=self._readers, tick=self._tick).run(jobs)

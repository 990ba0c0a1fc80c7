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
from torch import Tensor

import taskloom
from taskloom.merge.device.accelerator import Accelerator
from taskloom.merge.device.account import DeviceBudget, needs_device
from taskloom.merge.device.files import InputFiles
from taskloom.merge.device.findings import Findings
from taskloom.merge.device.model import Cuts, ModelFacts, RankSearch, follows_majority, is_wide, ranked_together
from taskloom.merge.device.pipeline import Load, Memory, Pipeline, Source
from taskloom.merge.device.tensors import merge_tensors
from taskloom.merge.errors import MergeError
from taskloom.merge.execute import TensorStats
from taskloom.merge.plan import MergePlan, TensorJob

_DIGIT = 16


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
            self._open.callback(accelerator.synchronize)
            with self._guarded(None):
                self._taken = Memory(accelerator, budget)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the inputs and give the device's memory back; nothing can be run afterwards."""
        self._open.close()
        self._taken = None

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

    # What is found over the whole model, before the first output.

    def _prepared(self) -> ModelFacts:
        if self._facts is None:
            facts = ModelFacts()
            facts.cuts = self._find_cuts()
            facts.zero_sign = self._find_majority(facts)
            self._facts = facts
        return self._facts

    def _pass(self, jobs: Sequence[TensorJob], look: Callable[[Load], None]) -> None:
        """Show every job's tensors on the device to ``look``, in order."""

        def merge(load: Load) -> None:
            with self._guarded(load.job):
                look(load)

        Pipeline(self._memory, self._source, merge, readers=self._readers, tick=self._tick).run(jobs)

    def _find_cuts(self) -> dict[str, Cuts]:
        jobs = [job for job in ranked_together(self._plan) if needs_device(job)]
        if not jobs or jobs[0].stages is None:
            return {}
        wide, stages = is_wide(jobs[0]), jobs[0].stages
        search = RankSearch(list(zip(stages.rank_begin, stages.rank_end, strict=True)), wide)
        for shift in search.shifts:
            search.narrow(self._count_digits(jobs, search.wanted(), shift, wide))
        thresholds, equal = search.thresholds(), self._count_equal(jobs, search.bits(), wide)
        return {job.name: Cuts(thresholds, share) for job, share in zip(jobs, search.shares(equal), strict=True)}

    def _count_digits(self, jobs: Sequence[TensorJob], wanted: Sequence[Sequence[int]], shift: int, wide: bool) -> list[dict[int, Tensor]]:
        device = self._accelerator.device
        with self._accelerator.lane("merge"):
            totals = [{prefix: torch.zeros(1 << _DIGIT, dtype=torch.int64, device=device) for prefix in of_task} for of_task in wanted]

        def look(load: Load) -> None:
            for tuned, of_task in zip(load.tuned, totals, strict=True):
                for prefix, total in of_task.items():
                    total += taskloom.magnitude_histogram(tuned, load.base, shift=shift, prefix=prefix, wide=wide)

        self._pass(jobs, look)
        with self._accelerator.lane("merge"):
            return [{prefix: total.cpu() for prefix, total in of_task.items()} for of_task in totals]

    def _count_equal(self, jobs: Sequence[TensorJob], bits: Sequence[Sequence[int]], wide: bool) -> list[Tensor]:
        """How many entries of each job and task equal each cut: int64 ``[tasks, 2]`` per job."""
        found: list[Tensor] = []

        def look(load: Load) -> None:
            counts = []
            for tuned, pair in zip(load.tuned, bits, strict=True):
                for cut in pair:
                    digits = taskloom.magnitude_histogram(tuned, load.base, shift=0, prefix=cut >> _DIGIT, wide=wide)
                    counts.append(digits[cut & (1 << _DIGIT) - 1])
            found.append(torch.stack(counts).reshape(-1, 2))

        self._pass(jobs, look)
        with self._accelerator.lane("merge"):
            return [count.cpu() for count in found]

    def _find_majority(self, facts: ModelFacts) -> int:
        balances: list[Tensor] = []

        def look(load: Load) -> None:
            if load.out is not None:
                figures = merge_tensors(load.job, self._plan.seed, load.base, load.tuned, load.out, facts, magnitude_histogram=False)
                if figures.counts is not None:
                    balances.append(figures.counts[-1])

        self._pass([job for job in follows_majority(self._plan) if needs_device(job)], look)
        with self._accelerator.lane("merge"):
            return -1 if sum(int(balance) for balance in balances) < 0 else 1

"""Finds what must be known of the whole model, in passes over its tensors on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import taskloom
from taskloom.merge.device.account import needs_device
from taskloom.merge.device.model import Cuts, ModelFacts, RankSearch, follows_majority, is_wide, ranked_together
from taskloom.merge.device.tensors import merge_tensors
from taskloom.merge.plan import MergePlan, TensorJob

_DIGIT = 16

# Gets a job with its base, its tuned tensors, and room for its output.
Look = Callable[[TensorJob, Tensor | None, Sequence[Tensor], Tensor], None]
# Shows the tensors of jobs, in order.
Visit = Callable[[Sequence[TensorJob], Look], None]


def find_facts(plan: MergePlan, visit: Visit, device: torch.device) -> ModelFacts:
    """The cuts of ``scope: model`` and the majority sign; no pass where a plan has neither.

    Raises
    ------
    MergeError
        If tensors that are ranked together have other precisions.
    """
    facts = ModelFacts()
    facts.cuts = _find_cuts([job for job in ranked_together(plan) if needs_device(job)], visit, device)
    facts.zero_sign = _find_majority([job for job in follows_majority(plan) if needs_device(job)], visit, plan.seed, facts)
    return facts


def _find_cuts(jobs: Sequence[TensorJob], visit: Visit, device: torch.device) -> dict[str, Cuts]:
    if not jobs or jobs[0].stages is None:
        return {}
    wide, stages = is_wide(jobs[0]), jobs[0].stages
    search = RankSearch(list(zip(stages.rank_begin, stages.rank_end, strict=True)), wide)
    for shift in search.shifts:
        search.narrow(_count_digits(jobs, visit, device, search.wanted(), shift, wide))
    thresholds, equal = search.thresholds(), _count_equal(jobs, visit, search.bits(), wide)
    return {job.name: Cuts(thresholds, share) for job, share in zip(jobs, search.shares(equal), strict=True)}


def _count_digits(
    jobs: Sequence[TensorJob], visit: Visit, device: torch.device, wanted: Sequence[Sequence[int]], shift: int, wide: bool
) -> list[dict[int, Tensor]]:
    """Counts of a digit over all jobs, in host memory, per task and higher digits."""
    totals = [{prefix: torch.zeros(1 << _DIGIT, dtype=torch.int64, device=device) for prefix in of_task} for of_task in wanted]

    def look(job: TensorJob, base: Tensor | None, tuned: Sequence[Tensor], out: Tensor) -> None:
        for task, of_task in zip(tuned, totals, strict=True):
            for prefix, total in of_task.items():
                total += taskloom.magnitude_histogram(task, base, shift=shift, prefix=prefix, wide=wide)

    visit(jobs, look)
    return [{prefix: total.cpu() for prefix, total in of_task.items()} for of_task in totals]


def _count_equal(jobs: Sequence[TensorJob], visit: Visit, bits: Sequence[Sequence[int]], wide: bool) -> list[Tensor]:
    """How many entries of each job and task equal each cut: int64 ``[tasks, 2]`` per job."""
    found: list[Tensor] = []

    def look(job: TensorJob, base: Tensor | None, tuned: Sequence[Tensor], out: Tensor) -> None:
        counts = []
        for task, pair in zip(tuned, bits, strict=True):
            for cut in pair:
                digits = taskloom.magnitude_histogram(task, base, shift=0, prefix=cut >> _DIGIT, wide=wide)
                counts.append(digits[cut & (1 << _DIGIT) - 1].clone())
        found.append(torch.stack(counts).reshape(-1, 2))

    visit(jobs, look)
    return [count.cpu() for count in found]


def _find_majority(jobs: Sequence[TensorJob], visit: Visit, seed: int, facts: ModelFacts) -> int:
    balances: list[Tensor] = []

    def look(job: TensorJob, base: Tensor | None, tuned: Sequence[Tensor], out: Tensor) -> None:
        figures = merge_tensors(job, seed, base, tuned, out, facts, magnitude_histogram=False)
        if figures.counts is not None:
            balances.append(figures.counts[-1])

    visit(jobs, look)
    return -1 if sum(int(balance) for balance in balances) < 0 else 1

"""What must be known of the whole model before its first tensor is merged: the cuts of ``scope: model``, and the majority sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from taskloom.merge.errors import MergeError
from taskloom.merge.plan import MergePlan, TensorJob

_DIGIT = 16


@dataclass(frozen=True)
class Cuts:
    """A tensor's share of the cuts of a whole model: per task and rank (begin, end), the threshold, and how many equal entries it keeps."""

    threshold: Tensor
    equal_kept: Tensor


@dataclass
class ModelFacts:
    """Cuts by the tensor's name, and the sign that an election of exactly zero takes where it follows the majority."""

    cuts: dict[str, Cuts] = field(default_factory=dict)
    zero_sign: int = 1


def is_wide(job: TensorJob) -> bool:
    """Whether a job's arithmetic is float64."""
    return any(source.dtype == "F64" for source in (job.base, *job.tuned) if source is not None)


def ranked_together(plan: MergePlan) -> list[TensorJob]:
    """The jobs whose entries are ranked over the whole model, in the order in which equal magnitudes rank: by name.

    Raises
    ------
    MergeError
        If they are of several precisions.
    """
    jobs = [job for job in plan.jobs if job.stages is not None and job.stages.select == "magnitude" and job.stages.scope == "model"]
    jobs.sort(key=lambda job: job.name.encode())
    for job in jobs:
        if is_wide(job) != is_wide(jobs[0]):
            both = f"{jobs[0].name!r} and {job.name!r}"
            raise MergeError(f"scope: model cannot rank float64 tensors together with others: {both}")
    return jobs


def follows_majority(plan: MergePlan) -> list[TensorJob]:
    """The jobs whose elections of exactly zero take the sign that the whole model elects more often."""
    return [job for job in plan.jobs if job.stages is not None and job.stages.zero_sign == "majority" and job.stages.elect != "none"]


class _Search:
    """One rank: the digits of its magnitude found so far, and the rank among the entries that have them."""

    def __init__(self, rank: int) -> None:
        self.left = rank
        self.prefix = 0

    def narrow(self, counts: Tensor) -> None:
        """Take the next digit from the counts of each."""
        from_top = counts.flip(0).cumsum(0)
        place = int((from_top < self.left).sum())
        digit = len(counts) - 1 - place
        self.left -= int(from_top[place]) - int(counts[digit])
        self.prefix = self.prefix << _DIGIT | digit


class RankSearch:
    """Exact cuts of the ranks of every task over tensors that come one after another, several times: radix histograms of 16 bits.

    Each pass calls :meth:`wanted` for the histograms to be taken of every tensor, adds them up, and ends with :meth:`narrow`.
    """

    def __init__(self, ranks: Sequence[tuple[int, int]], wide: bool) -> None:
        self._wide = wide
        self._above_all = (1 << (63 if wide else 31)) - 1
        self._searches = [[_Search(rank) for rank in pair] for pair in ranks]
        self.shifts = range(48 if wide else 16, -1, -_DIGIT)

    def wanted(self) -> list[list[int]]:
        """Per task, the higher digits whose entries are to be counted in this pass."""
        return [sorted({search.prefix for search in of_task if search.left > 0}) for of_task in self._searches]

    def narrow(self, counts: Sequence[dict[int, Tensor]]) -> None:
        """Go on to the next digit with the counts over all tensors, in host memory, per task and higher digits."""
        for of_task, found in zip(self._searches, counts, strict=True):
            for search in of_task:
                if search.left > 0:
                    search.narrow(found[search.prefix])

    def bits(self) -> list[list[int]]:
        """After the last pass: the bits of each rank's magnitude; above all where the rank is 0."""
        return [[search.prefix if search.left > 0 else self._above_all for search in of_task] for of_task in self._searches]

    def shares(self, equal: Sequence[Tensor]) -> list[Tensor]:
        """How many of its equal entries each tensor keeps, from how many it has: int64 ``[tasks, 2]`` each, the first tensors first."""
        left = torch.tensor([[search.left for search in of_task] for of_task in self._searches])
        shares = []
        for count in equal:
            shares.append(torch.minimum(count, left))
            left = left - shares[-1]
        return shares

    def thresholds(self) -> Tensor:
        """The magnitudes, ``[tasks, 2]``."""
        integer, floating = (torch.int64, torch.float64) if self._wide else (torch.int32, torch.float32)
        return torch.tensor(self.bits(), dtype=integer).view(floating)

"""Computes the tensors of a merge again, piece by piece, with the plain-torch definitions of taskloom.reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from taskloom.merge.errors import MergeError
from taskloom.merge.plan import MergePlan, Stages, TensorJob, TensorSource
from taskloom.merge.torch_dtypes import TORCH_DTYPES
from taskloom.merge.verify.reader import TensorReader, is_ranked_by_row, pieces
from taskloom.merge.verify.thresholds import RankCut, rank_cuts
from taskloom.reference.masked.magnitude import delta, magnitude_bits
from taskloom.reference.masked.select import Selection, selected_entries
from taskloom.reference.masked.sparse_merge import combined, contribution, elected_sign, merged_values, rescale_factor, signed_sum

# mergekit leaves a delta alone where either L1 norm is below this; beyond this cosine an arc is a line.
_LEAST_NORM = 1e-7
_PARALLEL_COSINE = 0.9995

# The executor sums norms in another order, and blocks of them in the precision of the deltas: how far a factor may be from ours.
ROUNDING = {torch.float32: 2.0**-18, torch.float64: 2.0**-46}

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Expected:
    """One piece of a tensor computed again.

    Attributes
    ----------
    begin, values
        Index of its first entry, and what the output must hold, in the output's dtype.
    slack
        How far each entry may be off besides one unit in its last place (float64); None where the bits must be equal.
    undecided, otherwise
        Entries whose sign election lies within rounding, and what they are if it falls the other way.
    """

    begin: int
    values: Tensor
    slack: Tensor | None = None
    undecided: Tensor | None = None
    otherwise: Tensor | None = None


@dataclass(frozen=True)
class _Piece:
    """A piece of the inputs of one job: base, deltas, and what survives of them."""

    begin: int
    base: Tensor | None
    deltas: list[Tensor]
    kept: list[Tensor]
    selections: list[Selection]


@dataclass
class _Known:
    """What must be known of a whole job or model before its first piece: cuts and ties before it per task, factors, zero sign."""

    cuts: list[list[RankCut]] = field(default_factory=list)
    seen: list[list[int]] = field(default_factory=list)
    factors: list[Tensor | None] = field(default_factory=list)
    zero_sign: int = 1


def is_bit_exact(job: TensorJob) -> bool:
    """Whether the executor's arithmetic is the reference's to the bit: everywhere but where sums over a whole tensor enter the values."""
    stages = job.stages
    return stages is None or (stages.interpolation == "none" and not _matches_norms(stages))


def _matches_norms(stages: Stages) -> bool:
    return stages.rescale == "l1" and stages.select != "all"


def _is_ranked_in_passes(job: TensorJob) -> bool:
    return job.stages is not None and job.stages.select == "magnitude" and not is_ranked_by_row(job)


def _ranks(stages: Stages) -> list[list[int]]:
    return [[begin, end] for begin, end in zip(stages.rank_begin, stages.rank_end, strict=True)]


class Recomputation:
    """The tensors of one plan, computed again.

    Parameters
    ----------
    plan
        What was done. Its jobs' targets are not used.
    reader
        Reads the inputs.
    """

    def __init__(self, plan: MergePlan, reader: TensorReader) -> None:
        self._plan = plan
        self._reader = reader
        self._model_cuts: dict[str, _Known] = {}
        self._majority: int | None = None

    def prepare(self, jobs: Sequence[TensorJob], progress: Progress | None = None) -> None:
        """Find what depends on the whole model, if one of ``jobs`` needs it: thresholds of ``scope: model``, the majority sign.

        ``progress`` is called with the number of passes' entries that were read so far.

        Raises
        ------
        MergeError
            If tensors that are ranked together have other precisions.
        """
        done = 0

        def count(entries: int) -> None:
            nonlocal done
            done += entries
            if progress is not None:
                progress(done)

        majority = [job for job in self._plan.jobs if job.stages is not None and self._follows_majority(job.stages)]
        wants_majority = any(job.stages is not None and self._follows_majority(job.stages) for job in jobs)
        ranked = [job for job in self._plan.jobs if _is_ranked_in_passes(job) and job.stages is not None and job.stages.scope == "model"]
        wanted = {job.name for job in (*jobs, *(majority if wants_majority else ()))}
        if any(job.name in wanted for job in ranked):
            self._find_model_cuts(sorted(ranked, key=lambda job: job.name), count)
        if wants_majority:
            self._majority = self._majority_sign(majority, count)

    def prepared_entries(self, jobs: Sequence[TensorJob]) -> int:
        """What ``progress`` of :meth:`prepare` counts to, for jobs in float32."""
        total = 0
        follows = [job for job in self._plan.jobs if job.stages is not None and self._follows_majority(job.stages)]
        if any(job in follows for job in jobs):
            total += sum(prod(job.shape) for job in follows)
        ranked = [job for job in self._plan.jobs if _is_ranked_in_passes(job) and job.stages is not None and job.stages.scope == "model"]
        if any(job in ranked for job in (*jobs, *(follows if total else ()))):
            total += 3 * sum(prod(job.shape) for job in ranked)
        return total

    @staticmethod
    def _follows_majority(stages: Stages) -> bool:
        return stages.zero_sign == "majority" and stages.elect != "none"

    def expected(self, job: TensorJob) -> Iterator[Expected]:
        """A merged job's output, piece by piece, in order."""
        stages = _stages(job)
        if stages.interpolation == "slerp":
            yield from self._arc(job, stages)
            return
        exact = is_bit_exact(job)
        known = self._known(job)
        known.factors = self._factors(job, known)
        for piece in self._selected(job, known):
            yield self._merged(job, stages, piece, known, exact)

    def converted(self, job: TensorJob) -> Iterator[Expected]:
        """A copied floating-point job's output in its target's dtype."""
        for begin, count in pieces(job):
            values = self._load(job, job.base, begin, count)
            if values is not None:
                yield Expected(begin, values.to(TORCH_DTYPES[job.target.dtype]))

    def _load(self, job: TensorJob, source: TensorSource | None, begin: int, count: int) -> Tensor | None:
        if source is None:
            return None
        values = self._reader.read(self._plan.inputs[source.file], source.offset, source.dtype, begin, count)
        return values.reshape(-1, job.shape[-1]) if is_ranked_by_row(job) else values

    def _deltas(self, job: TensorJob) -> Iterator[tuple[int, Tensor | None, list[Tensor]]]:
        """Begin, base and deltas of each piece, in the job's arithmetic."""
        dtype = arithmetic(job)
        for begin, count in pieces(job):
            base = self._load(job, job.base, begin, count)
            tuned = [self._load(job, source, begin, count) for source in job.tuned]
            yield begin, base, [delta(values, base, dtype) for values in tuned if values is not None]

    def _magnitudes(self, jobs: Sequence[TensorJob], count: Progress | None) -> Iterator[list[Tensor]]:
        for job in jobs:
            for _, _, deltas in self._deltas(job):
                yield [magnitude_bits(values) for values in deltas]
                if count is not None:
                    count(deltas[0].numel())

    def _find_model_cuts(self, jobs: Sequence[TensorJob], count: Progress) -> None:
        wide = {arithmetic(job) for job in jobs}
        if len(wide) > 1:
            raise MergeError("scope: model cannot rank float64 tensors together with others")
        dtype = wide.pop()
        cuts = rank_cuts(lambda: self._magnitudes(jobs, count), _ranks(_stages(jobs[0])), dtype == torch.float64)
        seen = [[0, 0] for _ in cuts]
        for job in jobs:
            # Equal magnitudes rank by place in the model, so a tensor must know how many came before it.
            self._model_cuts[job.name] = _Known(cuts, [list(of_task) for of_task in seen])
            for magnitudes in self._magnitudes([job], count):
                for bits, of_task, before in zip(magnitudes, cuts, seen, strict=True):
                    for number, cut in enumerate(of_task):
                        before[number] += int((bits == cut.bits).sum())

    def _known(self, job: TensorJob) -> _Known:
        stages = _stages(job)
        zero_sign = 1 if self._majority is None or not self._follows_majority(stages) else self._majority
        if not _is_ranked_in_passes(job):
            return _Known(zero_sign=zero_sign)
        if stages.scope == "model":
            found = self._model_cuts[job.name]
            return _Known(found.cuts, [list(of_task) for of_task in found.seen], zero_sign=zero_sign)
        cuts = rank_cuts(lambda: self._magnitudes([job], None), _ranks(stages), arithmetic(job) == torch.float64)
        return _Known(cuts, [[0, 0] for _ in cuts], zero_sign=zero_sign)

    def _selection(self, job: TensorJob, stages: Stages, task: int, begin: int, values: Tensor, known: _Known) -> Selection:
        threshold = equal_kept = None
        if known.cuts:
            bits = magnitude_bits(values)
            threshold = torch.stack([cut.value(values.dtype) for cut in known.cuts[task]])
            equal_kept = torch.tensor([cut.equal_kept - seen for cut, seen in zip(known.cuts[task], known.seen[task], strict=True)])
            for number, cut in enumerate(known.cuts[task]):
                known.seen[task][number] += int((bits == cut.bits).sum())
        return Selection(
            select=stages.select,
            by_row=is_ranked_by_row(job),
            band=(stages.rank_begin[task], stages.rank_end[task]) if stages.rank_begin else (0, 0),
            threshold=threshold,
            equal_kept=equal_kept,
            mask=None,
            density=stages.density[task] if stages.density else 1.0,
            epsilon=stages.epsilon[task] if stages.epsilon else 0.0,
            seed=self._plan.seed,
            key=job.key,
            task=task,
            first=begin,
        )

    def _selected(self, job: TensorJob, known: _Known) -> Iterator[_Piece]:
        """The pieces of a job with what survives selection; counts ties in a copy of what is known."""
        stages = _stages(job)
        counting = _Known(known.cuts, [list(of_task) for of_task in known.seen])
        for begin, base, deltas in self._deltas(job):
            selections = [self._selection(job, stages, task, begin, values, counting) for task, values in enumerate(deltas)]
            kept = [selected_entries(values, selection) for values, selection in zip(deltas, selections, strict=True)]
            yield _Piece(begin, base, deltas, kept, selections)

    def _factors(self, job: TensorJob, known: _Known) -> list[Tensor | None]:
        """The ratios of L1 norms before and after selection, where a job restores them; else None per task."""
        if not _matches_norms(_stages(job)):
            return [None] * len(job.tuned)
        before, after = [0.0] * len(job.tuned), [0.0] * len(job.tuned)
        for piece in self._selected(job, known):
            for task, (values, mask) in enumerate(zip(piece.deltas, piece.kept, strict=True)):
                before[task] += float(values.double().abs().sum())
                after[task] += float(torch.where(mask, values, 0).double().abs().sum())
        return [
            torch.tensor(whole / rest if whole >= _LEAST_NORM and rest >= _LEAST_NORM else 1.0, dtype=arithmetic(job))
            for whole, rest in zip(before, after, strict=True)
        ]

    def _parts(self, job: TensorJob, piece: _Piece, factors: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
        """The weights and the weighted, rescaled contributions of each task."""
        stages = _stages(job)
        weights = [torch.tensor(weight, dtype=arithmetic(job)) for weight in stages.weight]
        parts = []
        for values, mask, weight, selection, found in zip(piece.deltas, piece.kept, weights, piece.selections, factors, strict=True):
            factor = rescale_factor(values, mask, selection, stages.rescale) if found is None else found
            parts.append(contribution(values, mask, weight, factor))
        return weights, parts

    def _majority_sign(self, jobs: Sequence[TensorJob], count: Progress) -> int:
        """The sign that more places of the whole model elect; positive where both elect as many."""
        balance = 0
        for job in jobs:
            known = self._known(job)
            factors = self._factors(job, known)
            for piece in self._selected(job, known):
                _, parts = self._parts(job, piece, factors)
                total = signed_sum(parts, _stages(job).elect)
                balance += int((total > 0).sum()) - int((total < 0).sum())
                count(total.numel())
        return -1 if balance < 0 else 1

    def _merged(self, job: TensorJob, stages: Stages, piece: _Piece, known: _Known, exact: bool) -> Expected:
        weights, parts = self._parts(job, piece, known.factors)
        elected = None if stages.elect == "none" else elected_sign(parts, stages.elect, known.zero_sign)

        def values(signs: Tensor | None) -> Tensor:
            return merged_values(
                piece.base,
                piece.deltas,
                piece.kept,
                parts,
                weights,
                signs,
                stages.vote,
                stages.consensus_k,
                stages.tall_mask_lambda,
                stages.combine,
                stages.scale,
                TORCH_DTYPES[job.target.dtype],
            )

        if exact:
            return Expected(piece.begin, values(elected).reshape(-1))
        rounding = ROUNDING[arithmetic(job)]
        slack = rounding * _size(piece, parts, weights, elected, stages)
        if elected is None or stages.elect != "sign_sum":
            return Expected(piece.begin, values(elected).reshape(-1), slack.reshape(-1))
        sizes = signed_sum([part.abs() for part in parts], "sign_sum")
        undecided = signed_sum(parts, "sign_sum").abs() <= rounding * sizes
        otherwise = values(-elected) if bool(undecided.any()) else None
        return Expected(
            piece.begin,
            values(elected).reshape(-1),
            slack.reshape(-1),
            undecided.reshape(-1),
            None if otherwise is None else otherwise.reshape(-1),
        )

    def _arc(self, job: TensorJob, stages: Stages) -> Iterator[Expected]:
        """Spherical interpolation from the base to the tuned tensor."""
        dtype, (tuned,) = arithmetic(job), job.tuned
        squared = torch.zeros(3, dtype=torch.float64)
        for begin, count in pieces(job):
            ends = (self._load(job, source, begin, count) for source in (job.base, tuned))
            first, second = (values.double() for values in ends if values is not None)
            squared += torch.stack([first @ first, first @ second, second @ second])
        weights = [torch.tensor(weight, dtype=dtype) for weight in arc_weights(squared, stages.t)]
        for begin, count in pieces(job):
            ends = (self._load(job, source, begin, count) for source in (job.base, tuned))
            parts = [weight * values.to(dtype) for weight, values in zip(weights, (end for end in ends if end is not None), strict=True)]
            values = combined(parts, weights, None, "sum").to(TORCH_DTYPES[job.target.dtype])
            yield Expected(begin, values, ROUNDING[dtype] * combined([part.abs().double() for part in parts], weights, None, "sum"))


def arithmetic(job: TensorJob) -> torch.dtype:
    """float64 where a tensor of the job is float64, else float32."""
    return torch.float64 if any(source.dtype == "F64" for source in (job.base, *job.tuned) if source is not None) else torch.float32


def arc_weights(products: Tensor, t: float) -> tuple[float, float]:
    """The factors of the ends a and b of a spherical interpolation, from <a,a>, <a,b>, <b,b>; those of a line where they are parallel."""
    aa, ab, bb = (float(product) for product in products)
    norms = math.sqrt(aa) * math.sqrt(bb)
    cosine = min(1.0, max(-1.0, ab / norms)) if norms > 0 else 0.0
    if abs(cosine) > _PARALLEL_COSINE:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin(angle * (1 - t)) / math.sin(angle), math.sin(angle * t) / math.sin(angle)


def _stages(job: TensorJob) -> Stages:
    if job.stages is None:
        raise ValueError(f"tensor {job.name!r} is copied, not merged")
    return job.stages


def _size(piece: _Piece, parts: Sequence[Tensor], weights: Sequence[Tensor], elected: Tensor | None, stages: Stages) -> Tensor:
    """The magnitudes that are added up in each entry, in float64: what rounding is relative to."""
    agreeing = parts if elected is None else [torch.where(part * elected > 0, part, 0) for part in parts]
    change = combined([part.abs().double() for part in agreeing], [weight.double() for weight in weights], None, stages.combine)
    size = abs(stages.scale) * change.abs()
    return size if piece.base is None else size + piece.base.double().abs()

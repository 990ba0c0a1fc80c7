"""sparse_merge in plain torch: select, rescale, elect, combine, vote; each product rounded before its add, tasks in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.reference.masked.magnitude import delta
from taskloom.reference.masked.select import Selection, rank_probabilities, selected_entries

# mergekit leaves a delta alone where either L1 norm is below the first, and a mean undivided where the weights sum to less than the other.
_LEAST_NORM = 1e-7
_NO_WEIGHT = 1e-8

# kept, conflicts, dots, nonfinite, sign_sum
Statistics = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _selections(
    tasks: int,
    select: str,
    by_row: bool,
    rank_begin: Sequence[int],
    rank_end: Sequence[int],
    threshold: Tensor | None,
    equal_kept: Tensor | None,
    masks: Sequence[Tensor],
    density: Sequence[float],
    epsilon: Sequence[float],
    seed: int,
    key: int,
) -> list[Selection]:
    return [
        Selection(
            select,
            by_row,
            (rank_begin[task], rank_end[task]) if rank_begin else (0, 0),
            None if threshold is None else threshold[task],
            None if equal_kept is None else equal_kept[task],
            masks[task] if masks else None,
            density[task] if density else 1.0,
            epsilon[task] if epsilon else 0.0,
            seed,
            key,
            task,
        )
        for task in range(tasks)
    ]


def rescale_factor(values: Tensor, kept: Tensor, selection: Selection, rescale: str) -> Tensor:
    """What the survivors of a task are multiplied by: a number, or one per entry where keep probabilities differ."""
    one = torch.ones((), dtype=values.dtype, device=values.device)
    if rescale == "density" and selection.select == "rank_dropout":
        return one / rank_probabilities(values, selection.density, selection.epsilon).to(values.dtype)
    if rescale == "density" and selection.density > 0:
        return torch.tensor(1 / selection.density, dtype=values.dtype, device=values.device)
    if rescale == "l1" and selection.select != "all":
        before = values.double().abs().sum()
        after = torch.where(kept, values, 0).double().abs().sum()
        measurable = (before >= _LEAST_NORM) & (after >= _LEAST_NORM)
        return torch.where(measurable, before / after, 1).to(values.dtype)
    return one


def contribution(values: Tensor, kept: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    """``weight * (factor * delta)`` where kept, else zero."""
    return weight * torch.where(kept, factor * torch.where(kept, values, 0), 0)


def signed_sum(parts: Sequence[Tensor], elect: str) -> Tensor:
    """The sum whose sign is elected: of the contributions, or of their signs."""
    total = torch.zeros_like(parts[0])
    for part in parts:
        total = total + (part if elect == "sign_sum" else (part > 0).to(part.dtype) - (part < 0).to(part.dtype))
    return total


def elected_sign(parts: Sequence[Tensor], elect: str, zero_sign: int) -> Tensor:
    """+1 or -1 for every entry; a sum of zero takes ``zero_sign``, or (0) the sign that is elected more often in the tensor."""
    total = signed_sum(parts, elect)
    positive, negative = total > 0, total < 0
    if zero_sign == 0:
        zero_sign = -1 if int(positive.sum()) < int(negative.sum()) else 1
    return torch.where(positive, 1, torch.where(negative, -1, zero_sign)).to(total.dtype)


def combined(parts: Sequence[Tensor], weights: Sequence[Tensor], elected: Tensor | None, combine: str) -> Tensor:
    """The sum of the contributions (of those of the elected sign), divided as ``combine`` says."""
    total, weight_sum = torch.zeros_like(parts[0]), torch.zeros_like(parts[0])
    all_weights = torch.zeros_like(weights[0])
    for part, weight in zip(parts, weights, strict=True):
        counts = part != 0 if elected is None else part * elected > 0
        total = total + (part if elected is None else torch.where(counts, part, 0))
        weight_sum = weight_sum + torch.where(counts, weight, 0)
        all_weights = all_weights + weight
    if combine == "disjoint_mean":
        return total / torch.where(weight_sum == 0, 1, weight_sum)
    if combine == "weighted_mean":
        return total / torch.where(all_weights.abs() < _NO_WEIGHT, 1, all_weights)
    return total


def votes(
    deltas: Sequence[Tensor], kept: Sequence[Tensor], weights: Sequence[Tensor], merged: Tensor, vote: str, lam: Sequence[float]
) -> Tensor:
    """How many tasks vote for each entry: those that selected it, or whose TALL mask is set (arXiv 2405.07813, equation 4)."""
    count = torch.zeros_like(merged, dtype=torch.int64)
    for task, (values, mask, weight) in enumerate(zip(deltas, kept, weights, strict=True)):
        if vote == "tall":
            own = weight * values
            mask = own.abs() > torch.tensor(lam[task], dtype=merged.dtype, device=merged.device) * (merged - own).abs()
        count = count + mask.long()
    return count


def merged_values(
    base: Tensor | None,
    deltas: Sequence[Tensor],
    kept: Sequence[Tensor],
    parts: Sequence[Tensor],
    weights: Sequence[Tensor],
    elected: Tensor | None,
    vote: str,
    consensus_k: int,
    tall_mask_lambda: Sequence[float],
    combine: str,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """What comes after the election: the ``parts`` combined, scaled, where enough tasks vote, onto the base."""
    merged = combined(parts, weights, elected, combine)
    change = torch.tensor(scale, dtype=merged.dtype, device=merged.device) * merged
    if vote != "none":
        change = torch.where(votes(deltas, kept, weights, merged, vote, tall_mask_lambda) >= consensus_k, change, 0)
    return (change if base is None else base.to(merged.dtype) + change).to(dtype)


def statistics(deltas: Sequence[Tensor], kept: Sequence[Tensor], parts: Sequence[Tensor], elect: str) -> Statistics:
    """What a merge counts: kept entries, entries in conflict, inner products, whether a delta is not finite, the balance of the election.

    A product of an inner product is rounded in the dtype of the deltas, their sum is taken in float64.
    """
    positive, negative = (torch.stack([side(part, 0) for part in parts]).any(0) for side in (torch.gt, torch.lt))
    dots = torch.stack([torch.stack([(one * other).double().sum() for other in deltas]) for one in deltas])
    finite = torch.stack([values.isfinite().all() for values in deltas]).all()
    total = torch.zeros_like(parts[0]) if elect == "none" else signed_sum(parts, elect)
    return (
        torch.stack([mask.sum() for mask in kept]),
        (positive & negative).sum(),
        dots,
        ~finite,
        (total > 0).sum() - (total < 0).sum(),
    )


@dataclass(frozen=True)
class _Merging:
    """A merge on its way: what its values and its statistics are made of."""

    deltas: list[Tensor]
    kept: list[Tensor]
    parts: list[Tensor]
    weights: list[Tensor]
    elected: Tensor | None


def _merging(
    base: Tensor | None,
    tuned: Sequence[Tensor],
    weight: Sequence[float],
    selections: list[Selection],
    rescale: str,
    elect: str,
    zero_sign: int,
) -> _Merging:
    accumulate = accumulation_dtype(base, *tuned)
    weights = [torch.tensor(value, dtype=accumulate, device=tuned[0].device) for value in weight]
    deltas = [delta(task, base, accumulate) for task in tuned]
    kept = [selected_entries(values, selection) for values, selection in zip(deltas, selections, strict=True)]
    parts = [
        contribution(values, mask, own, rescale_factor(values, mask, selection, rescale))
        for values, mask, own, selection in zip(deltas, kept, weights, selections, strict=True)
    ]
    return _Merging(deltas, kept, parts, weights, None if elect == "none" else elected_sign(parts, elect, zero_sign))


def sparse_merge_statistics(
    base: Tensor | None,
    tuned: Sequence[Tensor],
    weight: Sequence[float],
    select: str,
    by_row: bool,
    rank_begin: Sequence[int],
    rank_end: Sequence[int],
    threshold: Tensor | None,
    equal_kept: Tensor | None,
    masks: Sequence[Tensor],
    density: Sequence[float],
    epsilon: Sequence[float],
    seed: int,
    key: int,
    rescale: str,
    elect: str,
    zero_sign: int,
    vote: str,
    consensus_k: int,
    tall_mask_lambda: Sequence[float],
    combine: str,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Statistics]:
    """:func:`sparse_merge`, and what it counted on the way; see :class:`taskloom.SparseMergeStatistics`."""
    selections = _selections(len(tuned), select, by_row, rank_begin, rank_end, threshold, equal_kept, masks, density, epsilon, seed, key)
    found = _merging(base, tuned, weight, selections, rescale, elect, zero_sign)
    merged = merged_values(
        base,
        found.deltas,
        found.kept,
        found.parts,
        found.weights,
        found.elected,
        vote,
        consensus_k,
        tall_mask_lambda,
        combine,
        scale,
        dtype,
    )
    return merged, statistics(found.deltas, found.kept, found.parts, elect)


def sparse_merge(
    base: Tensor | None,
    tuned: Sequence[Tensor],
    weight: Sequence[float],
    select: str,
    by_row: bool,
    rank_begin: Sequence[int],
    rank_end: Sequence[int],
    threshold: Tensor | None,
    equal_kept: Tensor | None,
    masks: Sequence[Tensor],
    density: Sequence[float],
    epsilon: Sequence[float],
    seed: int,
    key: int,
    rescale: str,
    elect: str,
    zero_sign: int,
    vote: str,
    consensus_k: int,
    tall_mask_lambda: Sequence[float],
    combine: str,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """``base + scale * combine(elect(rescale(select(tuned - base))))``; see :func:`taskloom.sparse_merge` for the arguments."""
    selections = _selections(len(tuned), select, by_row, rank_begin, rank_end, threshold, equal_kept, masks, density, epsilon, seed, key)
    found = _merging(base, tuned, weight, selections, rescale, elect, zero_sign)
    return merged_values(
        base,
        found.deltas,
        found.kept,
        found.parts,
        found.weights,
        found.elected,
        vote,
        consensus_k,
        tall_mask_lambda,
        combine,
        scale,
        dtype,
    )

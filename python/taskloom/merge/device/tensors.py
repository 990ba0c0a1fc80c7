"""Merges the tensors of one job with the ops, and counts what a merge report needs of it; nothing here waits for the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import taskloom
from taskloom.merge.device.account import ARC_PIECE
from taskloom.merge.device.model import Cuts, ModelFacts, is_wide
from taskloom.merge.plan import Stages, TensorJob
from taskloom.ops.masked.sparse_merge import merge_with_statistics

# Beyond this cosine an arc is a line.
_PARALLEL_COSINE = 0.9995


@dataclass(frozen=True)
class Figures:
    """What was counted in one tensor, on its device.

    ``counts`` is int64: kept entries per task, conflicts, whether a delta is not finite, the balance of the election; ``dots`` float64;
    ``overflow`` whether the output holds NaN or infinity; ``histogram`` int64 ``[tasks, 256]`` where it was asked for.
    """

    counts: Tensor | None
    dots: Tensor | None
    overflow: Tensor
    histogram: Tensor | None = None


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


def _arguments(
    stages: Stages,
    base: Tensor | None,
    tuned: Sequence[Tensor],
    *,
    seed: int = 0,
    key: int = 0,
    cuts: Cuts | None = None,
    zero_sign: int = 1,
) -> dict[str, Any]:
    """The arguments of the op that carries stages out."""
    ranked = stages.select == "magnitude"
    random = stages.select in ("dropout", "rank_dropout")
    device = tuned[0].device
    return {
        "base": base,
        "tuned": list(tuned),
        "weight": list(stages.weight),
        "select": stages.select,
        "by_row": ranked and stages.scope == "row",
        "rank_begin": list(stages.rank_begin) if ranked and cuts is None else [],
        "rank_end": list(stages.rank_end) if ranked and cuts is None else [],
        "threshold": None if cuts is None else cuts.threshold.to(device),
        "equal_kept": None if cuts is None else cuts.equal_kept.to(device),
        "masks": [],
        "density": list(stages.density) if random else [],
        "epsilon": list(stages.epsilon) if stages.select == "rank_dropout" else [],
        "seed": _signed(seed),
        "key": _signed(key),
        "rescale": stages.rescale,
        "elect": stages.elect,
        "zero_sign": zero_sign if stages.zero_sign == "majority" else 1,
        "vote": stages.vote,
        "consensus_k": stages.consensus_k,
        "tall_mask_lambda": list(stages.tall_mask_lambda) if stages.vote == "tall" else [],
        "combine": stages.combine,
        "scale": stages.scale,
    }


def _arc_products(first: Tensor, second: Tensor) -> list[float]:
    """<a,a>, <a,b>, <b,b> of two tensors' values in float64; waits for the device."""
    ends = first.reshape(-1), second.reshape(-1)
    sums = torch.zeros(3, dtype=torch.float64, device=first.device)
    for begin in range(0, ends[0].numel(), ARC_PIECE):
        a, b = (end[begin : begin + ARC_PIECE].double() for end in ends)
        for place, (one, other) in enumerate(((a, a), (a, b), (b, b))):
            sums[place] += (one * other).sum()
    return [float(value) for value in sums.tolist()]


def _arc_weights(products: Sequence[float], t: float) -> tuple[float, float]:
    """The factors of the ends of a spherical interpolation at t; those of a line where they are parallel."""
    aa, ab, bb = products
    norms = math.sqrt(aa) * math.sqrt(bb)
    cosine = ab / norms if norms > 0 else 0.0
    # Not a number where an end is infinite.
    if not abs(cosine) <= _PARALLEL_COSINE:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin(angle * (1 - t)) / math.sin(angle), math.sin(angle * t) / math.sin(angle)


def _exponents(counts: Tensor, wide: bool) -> Tensor:
    """Counts by the exponent field of a float32 magnitude, 256 of them, from those of a magnitude's highest 16 bits."""
    if not wide:
        return counts[: 1 << 15].view(256, 128).sum(1)
    by_exponent = counts[: 1 << 15].view(2048, 16).sum(1)
    places = (torch.arange(2048, device=counts.device) - 1023 + 127).clamp(0, 255)
    return torch.zeros(256, dtype=torch.int64, device=counts.device).index_add_(0, places, by_exponent)


def histogram(job: TensorJob, base: Tensor | None, tuned: Sequence[Tensor]) -> Tensor:
    """Per task, counts of ``|delta|`` by float32 exponent field: int64 ``[tasks, 256]``."""
    wide = is_wide(job)
    shift = 48 if wide else 16
    return torch.stack([_exponents(taskloom.magnitude_histogram(task, base, shift=shift, wide=wide), wide) for task in tuned])


def _not_finite(values: Tensor) -> Tensor:
    """Whether a tensor holds NaN or infinity, without another tensor of its size."""
    low, high = torch.aminmax(values)
    return ~(low.isfinite() & high.isfinite())


def _counts(kept: Tensor, conflicts: Tensor, nonfinite: Tensor, sign_sum: Tensor) -> Tensor:
    return torch.cat([kept, torch.stack([conflicts, nonfinite.long(), sign_sum])])


def merge_tensors(
    job: TensorJob, seed: int, base: Tensor | None, tuned: Sequence[Tensor], out: Tensor, facts: ModelFacts, *, magnitude_histogram: bool
) -> Figures:
    """Carry a job out into ``out``; all tensors have the job's shape and lie on one device."""
    stages = job.stages
    if stages is None:
        if base is None:
            raise ValueError(f"tensor {job.name!r}: a copy needs a base")
        out.copy_(base)
        return Figures(None, None, _not_finite(out))
    found = histogram(job, base, tuned) if magnitude_histogram else None
    if stages.interpolation == "slerp" and base is not None:
        products = _arc_products(base, tuned[0])
        counted = merge_with_statistics(_arguments(Stages(_arc_weights(products, stages.t)), None, [base, tuned[0]]), out)
        distance = max(0.0, products[0] - 2 * products[1] + products[2])
        zero = torch.zeros_like(counted.conflicts)
        counts = _counts(counted.kept[:1], zero, counted.nonfinite, zero)
        return Figures(counts, torch.full_like(counted.dots[:1, :1], distance), _not_finite(out), found)
    cuts = facts.cuts.get(job.name)
    arguments = _arguments(stages, base, tuned, seed=seed, key=job.key, cuts=cuts, zero_sign=facts.zero_sign)
    counted = merge_with_statistics(arguments, out)
    return Figures(_counts(*counted[:2], *counted[3:]), counted.dots, _not_finite(out), found)

"""Checks the arguments of sparse_merge and turns them into the flat lists that the op takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from taskloom._selection import name_key
from taskloom.ops._checks import check_all_floating_like, check_floating, check_packed, check_shape
from taskloom.ops._compile import constant_under_compile
from taskloom.ops.masked._bands import OnOverflow, Scope, check_choice, check_number, check_word, rank_band, segment_length
from taskloom.ops.masked.magnitude_mask import given_band
from taskloom.ops.masked.magnitude_threshold import MagnitudeThreshold
from taskloom.ops.masked.packed_mask import pack_mask

Select = Literal["all", "magnitude", "mask", "dropout", "rank_dropout"]
Rescale = Literal["none", "density", "l1"]
Elect = Literal["none", "sign_sum", "sign_count"]
ZeroSign = Literal["positive", "negative", "majority"]
Vote = Literal["none", "selected", "tall"]
Combine = Literal["sum", "weighted_mean", "disjoint_mean"]

OP = "sparse_merge"
_ZERO_SIGNS = {"positive": 1, "negative": -1, "majority": 0}


def check_tensors(base: Tensor | None, tuned: Sequence[Tensor]) -> None:
    """Raise unless there are tuned tensors of one shape, which is the base's."""
    if not isinstance(tuned, (list, tuple)):
        raise TypeError(f"{OP}: tuned: expected a list of tensors, got {type(tuned).__name__}")
    if not tuned:
        raise ValueError(f"{OP}: tuned: expected at least one tensor, got none")
    if base is not None:
        check_floating(OP, "base", base)
    else:
        check_floating(OP, "tuned[0]", tuned[0])
    of, like = ("tuned[0]", tuned[0]) if base is None else ("base", base)
    check_all_floating_like(OP, "tuned", tuned, like, of)


def per_task(name: str, value: float | Sequence[float], tasks: int, low: float | None = None, high: float | None = None) -> list[float]:
    """One number per task from one number or a sequence of them."""
    values = list(value) if isinstance(value, Sequence) else [value] * tasks
    if len(values) != tasks:
        raise ValueError(f"{OP}: {name}: expected one number or one per task ({tasks}), got {len(values)}")
    for number in values:
        check_number(OP, name, number, low, high)
    return values


def signed_word(value: int) -> int:
    """The signed int of the same 64 bits, which an op's schema can hold."""
    return value - (1 << 64) if value >= 1 << 63 else value


@constant_under_compile
def tensor_key(key: int | str) -> int:
    """The key of a tensor's random words: given, or the hash of the tensor's name that checkpoint merges use."""
    if isinstance(key, str):
        return signed_word(name_key(key))
    check_word(OP, "key", key)
    return signed_word(key)


def _given_thresholds(
    base: Tensor | None, tuned: Sequence[Tensor], scope: Scope, threshold: Sequence[MagnitudeThreshold]
) -> tuple[Tensor, Tensor]:
    """The cuts of all tasks as the kernels take them."""
    if len(threshold) != len(tuned) or not all(isinstance(cut, MagnitudeThreshold) for cut in threshold):
        raise ValueError(f"{OP}: threshold: expected a list of one MagnitudeThreshold per task ({len(tuned)}), got {len(threshold)}")
    if scope != "tensor":
        raise ValueError(f"{OP}: threshold: expected scope 'tensor' with it, got {scope!r}")
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in (base, *tuned))
    bands = [given_band(OP, cut, wide) for cut in threshold]
    return torch.stack([cut for cut, _ in bands]), torch.stack([kept for _, kept in bands])


def _given_ranks(rank: Sequence[int | tuple[int, int]], tasks: int, length: int, scope: Scope) -> list[tuple[int, int]]:
    """The kept range of descending ranks of each task."""
    if not isinstance(rank, Sequence) or len(rank) != tasks:
        got = len(rank) if isinstance(rank, Sequence) else type(rank).__name__
        raise ValueError(f"{OP}: rank: expected a list of one int or (begin, end) per task ({tasks}), got {got}")
    return [rank_band(OP, length, scope, rank=own, density=None, gamma=0.0, at_least_one=False, on_overflow="density") for own in rank]


def _magnitude_arguments(
    base: Tensor | None,
    tuned: Sequence[Tensor],
    scope: Scope,
    density: float | Sequence[float] | None,
    gamma: float | Sequence[float],
    at_least_one: bool,
    rank: Sequence[int | tuple[int, int]] | None,
    threshold: Sequence[MagnitudeThreshold] | None,
    on_overflow: OnOverflow,
) -> dict[str, Any]:
    tasks, length = len(tuned), segment_length(tuned[0], scope)
    for name, value in (("threshold", threshold), ("rank", rank)):
        if value is not None and (density is not None or gamma != 0 or at_least_one):
            raise ValueError(f"{OP}: {name}: expected no density, gamma or at_least_one beside it")
    if threshold is not None:
        if rank is not None:
            raise ValueError(f"{OP}: threshold: expected no rank beside it")
        cuts, equal_kept = _given_thresholds(base, tuned, scope, threshold)
        return {"threshold": cuts, "equal_kept": equal_kept}
    if rank is not None:
        bands = _given_ranks(rank, tasks, length, scope)
    elif density is None:
        raise ValueError(f"{OP}: density: select='magnitude' needs density, rank or threshold, got none of them")
    else:
        bands = [
            rank_band(OP, length, scope, rank=None, density=share, gamma=top, at_least_one=at_least_one, on_overflow=on_overflow)
            for share, top in zip(per_task("density", density, tasks, 0, 1), per_task("gamma", gamma, tasks, 0, 1), strict=True)
        ]
    return {"by_row": scope == "row", "rank_begin": [begin for begin, _ in bands], "rank_end": [end for _, end in bands]}


def _mask_arguments(tuned: Sequence[Tensor], masks: Sequence[Tensor] | None) -> dict[str, Any]:
    if masks is None or len(masks) != len(tuned):
        got = "none" if masks is None else len(masks)
        raise ValueError(f"{OP}: masks: select='mask' needs one mask per task ({len(tuned)}), got {got}")
    packed = []
    for task, mask in enumerate(masks):
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:
            check_shape(OP, f"masks[{task}]", mask, tuned[0].shape, "tuned[0]")
            packed.append(pack_mask(mask))
        else:
            check_packed(OP, f"masks[{task}]", mask, tuned[0].numel())
            packed.append(mask)
    return {"masks": packed}


def _dropout_arguments(
    tuned: Sequence[Tensor], select: Select, density: float | Sequence[float] | None, epsilon: float | Sequence[float] | None
) -> dict[str, Any]:
    tasks = len(tuned)
    if density is None:
        raise ValueError(f"{OP}: density: select={select!r} needs a keep probability, got none")
    shares = per_task("density", density, tasks, 0, 1)
    if select == "dropout":
        return {"density": shares}
    if epsilon is None:
        raise ValueError(f"{OP}: epsilon: select='rank_dropout' needs half the spread of the keep probabilities, got none")
    spreads = per_task("epsilon", epsilon, tasks, 0, 1)
    for share, spread in zip(shares, spreads, strict=True):
        if 0 < share < 1 and not (share - spread > 0 and share + spread < 1):
            raise ValueError(f"{OP}: epsilon: expected density - epsilon and density + epsilon inside (0, 1), got {share} and {spread}")
    return {"density": shares, "epsilon": [spread if 0 < share < 1 else 0.0 for share, spread in zip(shares, spreads, strict=True)]}


def selection_arguments(
    base: Tensor | None,
    tuned: Sequence[Tensor],
    *,
    select: Select,
    scope: Scope,
    density: float | Sequence[float] | None,
    gamma: float | Sequence[float],
    at_least_one: bool,
    rank: Sequence[int | tuple[int, int]] | None,
    threshold: Sequence[MagnitudeThreshold] | None,
    masks: Sequence[Tensor] | None,
    epsilon: float | Sequence[float] | None,
    on_overflow: OnOverflow,
) -> dict[str, Any]:
    """The op's arguments of the selection stage; an argument that the selection has no use for is an error."""
    check_choice(OP, "select", select, ("all", "magnitude", "mask", "dropout", "rank_dropout"))
    check_choice(OP, "scope", scope, ("tensor", "row"))
    given = {
        "density": density is not None,
        "gamma": gamma != 0,
        "at_least_one": at_least_one,
        "rank": rank is not None,
        "threshold": threshold is not None,
        "masks": masks is not None,
        "epsilon": epsilon is not None,
    }
    uses = {
        "magnitude": ("density", "gamma", "at_least_one", "rank", "threshold"),
        "mask": ("masks",),
        "dropout": ("density",),
        "rank_dropout": ("density", "epsilon"),
    }
    for name, is_given in given.items():
        if is_given and name not in uses.get(select, ()):
            raise ValueError(f"{OP}: {name}: has no meaning with select={select!r}")
    arguments: dict[str, Any] = {
        "by_row": False,
        "rank_begin": [],
        "rank_end": [],
        "threshold": None,
        "equal_kept": None,
        "masks": [],
        "density": [],
        "epsilon": [],
    }
    if select == "magnitude":
        arguments |= _magnitude_arguments(base, tuned, scope, density, gamma, at_least_one, rank, threshold, on_overflow)
    elif select == "mask":
        arguments |= _mask_arguments(tuned, masks)
    elif select != "all":
        arguments |= _dropout_arguments(tuned, select, density, epsilon)
    return arguments


def stage_arguments(
    tasks: int,
    *,
    select: Select,
    rescale: Rescale,
    elect: Elect,
    zero_sign: ZeroSign,
    vote: Vote,
    consensus_k: int,
    tall_mask_lambda: float | Sequence[float],
    combine: Combine,
    scale: float,
) -> dict[str, Any]:
    """The op's arguments of the stages after selection."""
    check_choice(OP, "rescale", rescale, ("none", "density", "l1"))
    check_choice(OP, "elect", elect, ("none", "sign_sum", "sign_count"))
    check_choice(OP, "zero_sign", zero_sign, tuple(_ZERO_SIGNS))
    check_choice(OP, "vote", vote, ("none", "selected", "tall"))
    check_choice(OP, "combine", combine, ("sum", "weighted_mean", "disjoint_mean"))
    if rescale == "density" and select not in ("dropout", "rank_dropout"):
        raise ValueError(f"{OP}: rescale: 'density' divides by a keep probability, which select={select!r} does not have")
    if not isinstance(consensus_k, int) or isinstance(consensus_k, bool):
        raise TypeError(f"{OP}: consensus_k: expected an int, got {type(consensus_k).__name__}")
    if consensus_k < 0 or (vote == "none" and consensus_k != 0):
        raise ValueError(f"{OP}: consensus_k: expected 0 <= consensus_k (0 with vote='none'), got {consensus_k}")
    check_number(OP, "scale", scale)
    lambdas = per_task("tall_mask_lambda", tall_mask_lambda, tasks, 0) if vote == "tall" else []
    if any(value <= 0 for value in lambdas):
        raise ValueError(f"{OP}: tall_mask_lambda: expected numbers above 0, got {lambdas}")
    return {
        "rescale": rescale,
        "elect": elect,
        "zero_sign": _ZERO_SIGNS[zero_sign],
        "vote": vote,
        # More than every task is as much as one more.
        "consensus_k": min(consensus_k, tasks + 1),
        "tall_mask_lambda": lambdas,
        "combine": combine,
        "scale": scale,
    }

"""Merging of task vectors: select, rescale, elect, combine, in one pass over the base and the tuned tensors."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from taskloom.ops._backends import kernel
from taskloom.ops._checks import FLOATING, check_floating, check_shape, check_writable, mark_changed
from taskloom.ops._register import register
from taskloom.ops.masked._bands import OnOverflow, Scope, check_word
from taskloom.ops.masked._merge_arguments import (
    Combine,
    Elect,
    Rescale,
    Select,
    Vote,
    ZeroSign,
    check_tensors,
    per_task,
    selection_arguments,
    signed_word,
    stage_arguments,
    tensor_key,
)
from taskloom.ops.masked.magnitude_threshold import MagnitudeThreshold
from taskloom.reference import masked as reference


class SparseMergeStatistics(NamedTuple):
    """What a merge of T tasks counts, as tensors on the device of its inputs.

    Attributes
    ----------
    kept
        int64 ``[T]``: entries that selection keeps.
    conflicts
        int64 ``[]``: entries where contributions of two tasks have opposite signs, before any election.
    dots
        float64 ``[T, T]``: inner products of the deltas (without a base, of the values); squared norms on the diagonal. Products are
        rounded in the arithmetic's dtype, which parts of the sums may be taken in too.
    nonfinite
        bool ``[]``: whether a delta is NaN or infinite, kept or not.
    sign_sum
        int64 ``[]``: entries that elect a positive sign less those that elect a negative one; 0 without an election.
    """

    kept: Tensor
    conflicts: Tensor
    dots: Tensor
    nonfinite: Tensor
    sign_sum: Tensor


def _check_no_gradient(inputs: Sequence[Tensor]) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        raise RuntimeError("sparse_merge: statistics: have no gradient; call it under torch.no_grad() or on detached tensors")


def merge_with_statistics(arguments: Mapping[str, Any], out: Tensor) -> SparseMergeStatistics:
    """Run ``sparse_merge_statistics_out`` into ``out`` on the backend that serves its tensors; nothing is checked but the devices."""
    inputs = [*arguments["tuned"], *arguments["masks"]]
    inputs += [tensor for tensor in (arguments["base"], arguments["threshold"], arguments["equal_kept"]) if tensor is not None]
    run = kernel("sparse_merge_statistics_out", *inputs, out)
    if run is None:
        merged, counted = reference.sparse_merge_statistics(**arguments, dtype=out.dtype)
        out.copy_(merged)
        return SparseMergeStatistics(*counted)
    found = run(**arguments, out=out)
    mark_changed(out)
    return SparseMergeStatistics(*found)


def _check_out(out: Tensor, out_dtype: torch.dtype | None, inputs: Sequence[Tensor], shape: torch.Size) -> None:
    op = "sparse_merge"
    check_floating(op, "out", out)
    check_shape(op, "out", out, shape, "tuned[0]")
    check_writable(op, "out", out)
    if out_dtype is not None and out_dtype != out.dtype:
        raise ValueError(f"{op}: out_dtype: expected {out.dtype} as out, got {out_dtype}")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (out, *inputs)):
        raise RuntimeError(f"{op}: out: writing into a tensor has no gradient; call it under torch.no_grad() or on detached tensors")


@overload
def sparse_merge(
    base: Tensor | None,
    tuned: Sequence[Tensor],
    weight: float | Sequence[float] = 1.0,
    *,
    select: Select = "all",
    scope: Scope = "tensor",
    density: float | Sequence[float] | None = None,
    gamma: float | Sequence[float] = 0.0,
    at_least_one: bool = False,
    rank: Sequence[int | tuple[int, int]] | None = None,
    threshold: Sequence[MagnitudeThreshold] | None = None,
    masks: Sequence[Tensor] | None = None,
    epsilon: float | Sequence[float] | None = None,
    seed: int = 0,
    key: int | str = 0,
    rescale: Rescale = "none",
    elect: Elect = "none",
    zero_sign: ZeroSign = "positive",
    vote: Vote = "none",
    consensus_k: int = 0,
    tall_mask_lambda: float | Sequence[float] = 0.4,
    combine: Combine = "sum",
    scale: float = 1.0,
    on_overflow: OnOverflow = "density",
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    statistics: Literal[False] = False,
) -> Tensor: ...


@overload
def sparse_merge(
    base: Tensor | None,
    tuned: Sequence[Tensor],
    weight: float | Sequence[float] = 1.0,
    *,
    select: Select = "all",
    scope: Scope = "tensor",
    density: float | Sequence[float] | None = None,
    gamma: float | Sequence[float] = 0.0,
    at_least_one: bool = False,
    rank: Sequence[int | tuple[int, int]] | None = None,
    threshold: Sequence[MagnitudeThreshold] | None = None,
    masks: Sequence[Tensor] | None = None,
    epsilon: float | Sequence[float] | None = None,
    seed: int = 0,
    key: int | str = 0,
    rescale: Rescale = "none",
    elect: Elect = "none",
    zero_sign: ZeroSign = "positive",
    vote: Vote = "none",
    consensus_k: int = 0,
    tall_mask_lambda: float | Sequence[float] = 0.4,
    combine: Combine = "sum",
    scale: float = 1.0,
    on_overflow: OnOverflow = "density",
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    statistics: Literal[True],
) -> tuple[Tensor, SparseMergeStatistics]: ...


def sparse_merge(
    base: Tensor | None,
    tuned: Sequence[Tensor],
    weight: float | Sequence[float] = 1.0,
    *,
    select: Select = "all",
    scope: Scope = "tensor",
    density: float | Sequence[float] | None = None,
    gamma: float | Sequence[float] = 0.0,
    at_least_one: bool = False,
    rank: Sequence[int | tuple[int, int]] | None = None,
    threshold: Sequence[MagnitudeThreshold] | None = None,
    masks: Sequence[Tensor] | None = None,
    epsilon: float | Sequence[float] | None = None,
    seed: int = 0,
    key: int | str = 0,
    rescale: Rescale = "none",
    elect: Elect = "none",
    zero_sign: ZeroSign = "positive",
    vote: Vote = "none",
    consensus_k: int = 0,
    tall_mask_lambda: float | Sequence[float] = 0.4,
    combine: Combine = "sum",
    scale: float = 1.0,
    on_overflow: OnOverflow = "density",
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    statistics: bool = False,
) -> Tensor | tuple[Tensor, SparseMergeStatistics]:
    """Merge tuned versions of one tensor: ``base + scale * combine(elect(rescale(select(tuned - base))))``.

    With task t's delta ``d_t = tuned[t] - base``, its contribution is ``c_t = weight_t * (factor_t * d_t)`` where selected and zero
    elsewhere. Deltas are never stored. Names and meanings are those of a merge recipe's stages, and so are the results, to the bit.

    Parameters
    ----------
    base
        Tensor of any shape in float32, bfloat16, float16 or float64; None merges the values of ``tuned`` themselves, onto zero.
    tuned
        One tensor per task, T >= 1 of them, of the base's shape; dtypes may differ from the base's and among each other.
    weight
        One number, or one per task, as every argument below that takes a sequence.
    select
        Which entries of each delta survive. ``"all"``; ``"magnitude"``: a band of descending ranks of ``|d_t|`` (see
        :func:`magnitude_mask` for ``density``, ``gamma``, ``scope``, ``on_overflow``); ``"mask"``: ``masks``; ``"dropout"``: each entry
        with probability ``density`` (DARE, arXiv 2311.03099); ``"rank_dropout"``: with a probability that rises linearly with the rank of
        ``|d_t|`` in its row, from ``density - epsilon`` to ``density + epsilon`` (DELLA, arXiv 2406.11617).
    scope
        With ``"magnitude"``: what is ranked together, ``"tensor"`` or ``"row"`` (a slice of the last dimension).
    density
        Kept share in [0, 1], or keep probability.
    gamma
        With ``"magnitude"``: share of the largest entries that is removed (Breadcrumbs).
    at_least_one
        With ``"magnitude"``: keep one entry of a segment where a positive density rounds to none (mergekit's TIES).
    rank
        With ``"magnitude"``, in place of a density: per task k for the k largest of a segment, or ``(begin, end)``.
    threshold
        With ``"magnitude"``, in place of a density: one :class:`MagnitudeThreshold` per task, of shape ``[]`` or ``[2]`` for the ranks
        ``[begin, end]``, such as this tensor's share (:func:`split_threshold`) of a whole model's.
    masks
        With ``"mask"``: one per task, bool of the tensors' shape or packed (:func:`pack_mask`).
    epsilon
        With ``"rank_dropout"``: half the spread of the keep probabilities.
    seed, key
        Of the random words of ``"dropout"`` and ``"rank_dropout"``, 64 bits each. An entry's word is word ``i % 4`` of Philox 4x32-10
        (Salmon et al. 2011) with key ``seed`` and counter ``(i // 4, key + t * 0x9E3779B97F4A7C15)``, i being its flat index; it is kept
        where the word is below ``round(probability * 2**32)``. A ``str`` is a tensor's name, hashed as in a checkpoint merge (FNV-1a).
    rescale
        ``factor_t``: 1, or ``"density"``: 1 / keep probability (DARE), or ``"l1"``: the sum of ``|d_t|`` before selection over that after
        (mergekit; 1 where either is below 1e-7).
    elect
        ``"sign_sum"``: of each entry's contributions only those survive whose sign is that of their sum (TIES, arXiv 2306.01708);
        ``"sign_count"``: that of the majority of their signs.
    zero_sign
        Sign that a sum of exactly zero elects: ``"positive"`` (mergekit), ``"negative"``, or ``"majority"``, the sign elected more often
        in this tensor (official TIES code, for a tensor by itself).
    vote, consensus_k
        Entries with fewer than ``consensus_k`` votes keep the base's value. A task votes where it selected the entry (``"selected"``) or
        where ``|weight_t * d_t| > tall_mask_lambda_t * |combined - weight_t * d_t|`` (``"tall"``; arXiv 2405.07813, equation 4).
    tall_mask_lambda
        With ``vote="tall"``, above 0.
    combine
        ``"sum"`` of the contributions, divided by the sum of all weights (``"weighted_mean"``; undivided where that is below 1e-8 in
        size), or by the sum of the weights of the tasks that contribute to the entry (``"disjoint_mean"``).
    scale
        Factor of the combined delta.
    on_overflow
        As in :func:`magnitude_mask`.
    out_dtype
        Of the result; default: the base's, or that of ``tuned[0]``.
    out
        Where the result goes; may be the base or a tuned tensor.
    statistics
        Whether to count what a merge report is made of, in the same pass.

    Returns
    -------
    Tensor
        Of the tensors' shape; ``out`` where it is given.
    SparseMergeStatistics
        With ``statistics``, as the second of two.

    Raises
    ------
    TypeError
        If a tensor has a wrong dtype or an argument is no number.
    ValueError
        If shapes or numbers of entries per task differ, a value is out of range, an argument is missing for ``select`` or has no
        meaning with it.
    RuntimeError
        If ``out`` is given and a tensor requires grad.

    Notes
    -----
    Arithmetic is float32 (float64 where a tensor is float64), tasks in order, each product rounded before its add; the result is rounded
    once to its dtype. An entry to which nothing contributes is ``base + 0``, so -0.0 becomes 0.0. NaN ranks above infinity; a NaN or
    infinite contribution passes into the result, except that a NaN has no sign and is dropped by an election. Has no gradient.
    """
    op = "sparse_merge"
    check_tensors(base, tuned)
    check_word(op, "seed", seed)
    arguments: dict[str, Any] = {
        "base": base,
        "tuned": list(tuned),
        "weight": per_task("weight", weight, len(tuned)),
        "select": select,
        "seed": signed_word(seed),
        "key": tensor_key(key),
    }
    arguments |= selection_arguments(
        base,
        tuned,
        select=select,
        scope=scope,
        density=density,
        gamma=gamma,
        at_least_one=at_least_one,
        rank=rank,
        threshold=threshold,
        masks=masks,
        epsilon=epsilon,
        on_overflow=on_overflow,
    )
    arguments |= stage_arguments(
        len(tuned),
        select=select,
        rescale=rescale,
        elect=elect,
        zero_sign=zero_sign,
        vote=vote,
        consensus_k=consensus_k,
        tall_mask_lambda=tall_mask_lambda,
        combine=combine,
        scale=scale,
    )
    inputs = [*tuned, *arguments["masks"]]
    inputs += [tensor for tensor in (base, arguments["threshold"], arguments["equal_kept"]) if tensor is not None]
    dtype = out_dtype or (tuned[0] if base is None else base).dtype
    if out is not None:
        _check_out(out, out_dtype, inputs, tuned[0].shape)
    elif dtype not in FLOATING:
        raise TypeError(f"{op}: out_dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
    if statistics:
        if out is None:
            _check_no_gradient(inputs)
            out = tuned[0].new_empty(tuned[0].shape, dtype=dtype)
        return out, merge_with_statistics(arguments, out)
    if out is not None:
        run = kernel("sparse_merge_out", *inputs, out)
        if run is None:
            out.copy_(reference.sparse_merge(**arguments, dtype=out.dtype))
        else:
            run(**arguments, out=out)
            mark_changed(out)
        return out
    run = kernel(op, *inputs)
    if run is None:
        return reference.sparse_merge(**arguments, dtype=dtype)
    merged: Tensor = run(**arguments, dtype=dtype)
    return merged


def _fake_sparse_merge(base: Tensor | None, tuned: Sequence[Tensor], *settings: Any, dtype: torch.dtype, **named: Any) -> Tensor:
    return tuned[0].new_empty(tuned[0].shape, dtype=dtype)


def _fake_sparse_merge_out(*settings: Any, **named: Any) -> None:
    return None


def _fake_sparse_merge_statistics_out(base: Tensor | None, tuned: Sequence[Tensor], *settings: Any, **named: Any) -> tuple[Tensor, ...]:
    count = functools.partial(tuned[0].new_empty, dtype=torch.int64)
    dots = tuned[0].new_empty((len(tuned), len(tuned)), dtype=torch.float64)
    return count((len(tuned),)), count(()), dots, tuned[0].new_empty((), dtype=torch.bool), count(())


register("sparse_merge", fake=_fake_sparse_merge)
register("sparse_merge_out", fake=_fake_sparse_merge_out, mutates=True)
register("sparse_merge_statistics_out", fake=_fake_sparse_merge_statistics_out, mutates=True)

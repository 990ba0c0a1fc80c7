"""Masks of the entries that a magnitude selection keeps."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from taskloom.ops._backends import kernel
from taskloom.ops._checks import check_floating, check_floating_like, packed_bytes
from taskloom.ops._register import register
from taskloom.ops.masked._bands import OnOverflow, check_choice, rank_band, segment_length
from taskloom.ops.masked.magnitude_threshold import MagnitudeThreshold
from taskloom.reference import masked as reference


def given_band(op: str, threshold: MagnitudeThreshold, wide: bool) -> tuple[Tensor, Tensor]:
    """A given threshold as the kernels take it: the cuts of the first rank (none: rank 0) and of the end rank."""
    cut, equal_kept = threshold
    if cut.shape not in ((), (2,)) or equal_kept.shape != cut.shape:
        raise ValueError(f"{op}: threshold: expected shape () or (2,) for the ranks (begin, end), got {tuple(cut.shape)}")
    if cut.dtype not in ((torch.float32, torch.float64) if wide else (torch.float32,)) or equal_kept.dtype != torch.int64:
        raise TypeError(f"{op}: threshold: expected that of the same tensors, float32 and int64, got {cut.dtype} and {equal_kept.dtype}")
    if cut.dim() == 1:
        return cut, equal_kept
    # All magnitude bits set: the NaN that no other ranks above.
    integer, bits = (torch.int64, 2**63 - 1) if cut.dtype == torch.float64 else (torch.int32, 2**31 - 1)
    nothing = torch.full((), bits, dtype=integer, device=cut.device).view(cut.dtype)
    return torch.stack([nothing, cut]), torch.stack([torch.zeros_like(equal_kept), equal_kept])


def magnitude_mask(
    tuned: Tensor,
    base: Tensor | None = None,
    *,
    density: float | None = None,
    rank: int | tuple[int, int] | None = None,
    threshold: MagnitudeThreshold | None = None,
    gamma: float = 0.0,
    scope: Literal["tensor", "row"] = "tensor",
    on_overflow: OnOverflow = "density",
    packed: bool = False,
) -> Tensor:
    """Mask of the entries of ``tuned - base`` in a band of descending magnitude ranks.

    Entries are ranked by ``|tuned - base|``, rank 0 being the largest and, of equal ones, the lower index the larger; kept are exactly
    the ranks ``begin <= rank < end``.

    Parameters
    ----------
    tuned
        float32, bfloat16, float16 or float64 of any shape.
    base
        What is subtracted, same shape; None takes the values themselves.
    density
        Kept share of a segment of n entries: ``int(density * n)`` of them, after the largest ``int(gamma * n)`` were left out.
    rank
        k for the k largest, or ``(begin, end)``, in place of a density.
    threshold
        Found by :func:`magnitude_threshold`, in place of a density: of shape ``[]`` for the largest, or ``[2]`` for the ranks
        ``[begin, end]``. That of several tensors is shared out first (:func:`split_threshold`).
    gamma
        Share of the largest entries that is left out.
    scope
        Segment within which entries are ranked: ``"tensor"`` or ``"row"``, a slice of the last dimension.
    on_overflow
        Where gamma and density do not both fit: ``"density"`` leaves fewer of the largest out (mergekit), ``"drop"`` keeps fewer (the
        official Breadcrumbs code).
    packed
        Return bits in the format of :func:`pack_mask` in place of bools.

    Returns
    -------
    Tensor
        Bool of the shape of ``tuned``, or uint8 of shape ``[ceil(numel / 8)]``. Differences are taken and compared in float32
        (float64 where a tensor is float64) as the bits of their absolute values: NaN ranks above infinity.

    Raises
    ------
    TypeError
        If a tensor is not floating point, a rank no int, or the threshold of another dtype.
    ValueError
        If not exactly one of density, rank and threshold is given, one is out of range, or shapes differ.

    Notes
    -----
    Model Breadcrumbs (arXiv 2312.06795, section 3), with exact counts; one-sided magnitude pruning with ``gamma=0``.
    """
    op = "magnitude_mask"
    check_floating(op, "tuned", tuned)
    if base is not None:
        check_floating_like(op, "base", base, tuned, "tuned")
    check_choice(op, "scope", scope, ("tensor", "row"))
    tensors = [tuned] if base is None else [tuned, base]
    begin = end = 0
    cut = equal_kept = None
    if threshold is not None:
        if density is not None or rank is not None or gamma != 0 or scope != "tensor":
            raise ValueError(f"{op}: threshold: expected no density, rank, gamma or scope beside it")
        cut, equal_kept = given_band(op, threshold, any(tensor.dtype == torch.float64 for tensor in tensors))
        tensors = [*tensors, cut, equal_kept]
    else:
        length = segment_length(tuned, scope)
        begin, end = rank_band(op, length, scope, rank=rank, density=density, gamma=gamma, at_least_one=False, on_overflow=on_overflow)
    run = kernel(op, *tensors)
    if run is None:
        return reference.magnitude_mask(tuned, base, begin, end, scope == "row", cut, equal_kept, packed)
    mask: Tensor = run(tuned, base, begin, end, scope == "row", cut, equal_kept, packed)
    return mask


def _fake_magnitude_mask(
    tuned: Tensor,
    base: Tensor | None,
    rank_begin: int,
    rank_end: int,
    by_row: bool,
    threshold: Tensor | None,
    equal_kept: Tensor | None,
    packed: bool,
) -> Tensor:
    if packed:
        return tuned.new_empty((packed_bytes(tuned.numel()),), dtype=torch.uint8)
    return tuned.new_empty(tuned.shape, dtype=torch.bool)


register("magnitude_mask", fake=_fake_magnitude_mask, discrete=True)

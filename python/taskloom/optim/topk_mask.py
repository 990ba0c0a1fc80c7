"""Masks of the largest scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from taskloom.ops import magnitude_mask, magnitude_threshold, pack_mask, split_threshold
from taskloom.ops._checks import check_floating

# Groups of up to this many entries are compared pair by pair, which takes fewer passes than ranking each group.
_PAIRED = 8

Scope = Literal["tensor", "global", "row", "block"]


def _blocks(scores: Tensor, density: float, size: int) -> Tensor:
    """Each run of ``size`` entries of a row by itself; the last one of a row may be shorter."""
    flat = scores.reshape(1, -1) if scores.dim() < 2 else scores.reshape(-1, scores.shape[-1])
    whole = flat.shape[1] // size * size
    parts = []
    if whole:
        inside = magnitude_mask(flat[:, :whole].reshape(-1, size), density=density, scope="row")
        parts.append(inside.view(flat.shape[0], whole))
    if whole < flat.shape[1]:
        parts.append(magnitude_mask(flat[:, whole:].contiguous(), density=density, scope="row"))
    return torch.cat(parts, 1).view(scores.shape) if parts else torch.empty(scores.shape, dtype=torch.bool, device=scores.device)


def _one(scores: Tensor, density: float, scope: Scope, block_size: int | None, packed: bool) -> Tensor:
    if scope == "block":
        mask = _blocks(scores, density, block_size or 1)
        return pack_mask(mask) if packed else mask
    return magnitude_mask(scores, density=density, scope="row" if scope == "row" else "tensor", packed=packed)


@overload
def topk_mask(scores: Tensor, density: float, scope: Scope = ..., *, block_size: int | None = ..., packed: bool = ...) -> Tensor: ...
@overload
def topk_mask(
    scores: Mapping[str, Tensor], density: float, scope: Scope = ..., *, block_size: int | None = ..., packed: bool = ...
) -> dict[str, Tensor]: ...
@overload
def topk_mask(
    scores: Sequence[Tensor], density: float, scope: Scope = ..., *, block_size: int | None = ..., packed: bool = ...
) -> list[Tensor]: ...
def topk_mask(
    scores: Tensor | Mapping[str, Tensor] | Sequence[Tensor],
    density: float,
    scope: Scope = "tensor",
    *,
    block_size: int | None = None,
    packed: bool = False,
) -> Tensor | dict[str, Tensor] | list[Tensor]:
    """The entries of largest ``|score|``, exactly as many as the density says.

    Parameters
    ----------
    scores
        A tensor, or a sequence or mapping of tensors; float32, bfloat16, float16 or float64.
    density
        Share d of the n entries ranked together: ``int(d * n)`` of them are kept.
    scope
        What is ranked together. ``"tensor"`` (default): each tensor; ``"global"``: all tensors; ``"row"``: each slice of the last
        dimension; ``"block"``: each run of ``block_size`` entries of the last dimension (the last run of a slice may be shorter).
    block_size
        For ``"block"`` only.
    packed
        Whether masks are packed as :func:`taskloom.pack_mask` does. Default False: bool.

    Returns
    -------
    Tensor, dict or list
        As ``scores``. Of equal magnitudes the lower flat index is kept, of several tensors the earlier one; NaN ranks above infinity.

    Raises
    ------
    TypeError
        If a tensor is not floating point.
    ValueError
        If the density is out of range, the scope unknown, or ``block_size`` missing or out of place.
    """
    if scope not in ("tensor", "global", "row", "block"):
        raise ValueError(f'topk_mask: scope: expected one of "tensor", "global", "row", "block", got {scope!r}')
    if (scope == "block") != (block_size is not None):
        raise ValueError(f"topk_mask: block_size: expected one exactly with scope='block', got {block_size} with scope={scope!r}")
    if block_size is not None and block_size < 1:
        raise ValueError(f"topk_mask: block_size: expected at least 1, got {block_size}")
    if isinstance(scores, Tensor):
        return _one(scores, density, scope, block_size, packed)
    tensors = list(scores.values()) if isinstance(scores, Mapping) else list(scores)
    if scope == "global" and tensors:
        shares = split_threshold(magnitude_threshold(tensors, density=density), tensors)
        masks = [magnitude_mask(one, threshold=share, packed=packed) for one, share in zip(tensors, shares, strict=True)]
    else:
        masks = [_one(one, density, scope, block_size, packed) for one in tensors]
    return dict(zip(scores, masks, strict=True)) if isinstance(scores, Mapping) else masks


def _in_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """The n largest of each m: every pair of places is compared once, all groups together."""
    if m > _PAIRED:
        return magnitude_mask(scores.reshape(-1, m), rank=n, scope="row").view(scores.shape)
    wide = scores.dtype == torch.float64
    values = scores.detach().reshape(-1, m).t().to(torch.float64 if wide else torch.float32)
    # The bits of absolute values order as magnitude_mask orders them, NaN above infinity.
    bits = values.abs().contiguous().view(torch.int64 if wide else torch.int32)
    larger = torch.zeros(bits.shape, dtype=torch.int8, device=scores.device)
    for i in range(m):
        for j in range(i + 1, m):
            first = bits[i] >= bits[j]
            larger[j] += first
            larger[i] += first.logical_not_()
    return (larger < n).t().reshape(scores.shape)


def nm_mask(scores: Tensor, n: int = 2, m: int = 4, *, packed: bool = False) -> Tensor:
    """N:M sparsity: of each m entries next to each other in the last dimension, the n of largest ``|score|``.

    Parameters
    ----------
    scores
        Tensor whose last dimension is a multiple of m; float32, bfloat16, float16 or float64.
    n, m
        Entries kept of each group, and its size, ``0 <= n <= m``. Default 2:4.
    packed
        Whether the mask is packed as :func:`taskloom.pack_mask` does. Default False: bool.

    Returns
    -------
    Tensor
        Bool of the shape of ``scores``, or packed. Of equal magnitudes the lower index is kept; NaN ranks above infinity.

    Raises
    ------
    TypeError
        If the tensor is not floating point.
    ValueError
        If n or m is out of range, or the last dimension is no multiple of m.

    Notes
    -----
    2:4 is what sparse tensor cores take: Mishra et al., arXiv 2104.08378.
    """
    if m < 1 or not 0 <= n <= m:
        raise ValueError(f"nm_mask: n, m: expected 0 <= n <= m and m >= 1, got {n}:{m}")
    if scores.dim() == 0 or scores.shape[-1] % m:
        raise ValueError(f"nm_mask: scores: expected a last dimension that is a multiple of {m}, got shape {tuple(scores.shape)}")
    check_floating("nm_mask", "scores", scores)
    mask = _in_groups(scores, n, m)
    return pack_mask(mask) if packed else mask

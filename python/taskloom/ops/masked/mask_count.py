"""In how many masks each entry is set."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taskloom.ops._backends import kernel
from taskloom.ops._checks import check_packed, packed_bytes
from taskloom.ops._register import register
from taskloom.reference import masked as reference


def mask_count(packed: Tensor | Sequence[Tensor], numel: int, k: int) -> tuple[Tensor, Tensor]:
    """Count in how many of T masks each entry is set, without unpacking them.

    Parameters
    ----------
    packed
        uint8 of shape ``[T, ceil(numel / 8)]``, or T tensors of shape ``[ceil(numel / 8)]``, as :func:`pack_mask` gives, 1 <= T < 2^20;
        bits after the last entry are not looked at.
    numel
        Entries of each mask.
    k
        How many masks an entry must be set in to be set in the result, >= 0: 0 sets all, 1 is the OR of the masks, T their AND, and
        more than T sets none.

    Returns
    -------
    selected : Tensor
        uint8 of shape ``[ceil(numel / 8)]``: the packed mask of entries set in at least ``k`` masks; its tail is zero.
    histogram : Tensor
        int64 of shape ``[T + 1]``: how many entries are set in exactly 0, 1, .. T masks; they sum to ``numel``.

    Raises
    ------
    TypeError
        If a mask is no uint8 tensor, or ``k`` no int.
    ValueError
        If there is no mask, a mask has another number of bytes than ``numel`` needs, or ``numel`` or ``k`` is negative.

    Notes
    -----
    Source: the consensus mask and the mask profile of TALL-masks, Wang et al., ICML 2024, arXiv 2405.07813, section 4; counting by
    carry-save adders is this library's.
    """
    op = "mask_count"
    if isinstance(packed, Tensor) and packed.dim() != 2:
        raise ValueError(f"{op}: packed: expected two dimensions or a sequence of masks, got {packed.dim()} dimensions")
    masks = list(packed.unbind(0)) if isinstance(packed, Tensor) else list(packed)
    if not masks:
        raise ValueError(f"{op}: packed: expected at least one mask, got none")
    if numel < 0:
        raise ValueError(f"{op}: numel: must not be negative, got {numel}")
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"{op}: k: expected an int, got {type(k).__name__}")
    if k < 0:
        raise ValueError(f"{op}: k: must not be negative, got {k}")
    length = (packed_bytes(numel),)
    for place, mask in enumerate(masks):
        if not (isinstance(mask, Tensor) and mask.dtype == torch.uint8 and mask.shape == length):
            check_packed(op, f"packed[{place}]", mask, numel)
    run = kernel(op, *masks)
    if run is None:
        return reference.mask_count(masks, numel, k)
    found: tuple[Tensor, Tensor] = run(masks, numel, k)
    return found


def _fake_mask_count(packed: Sequence[Tensor], numel: int, k: int) -> tuple[Tensor, Tensor]:
    selected = packed[0].new_empty((packed_bytes(numel),))
    return selected, packed[0].new_empty((len(packed) + 1,), dtype=torch.int64)


register("mask_count", fake=_fake_mask_count, discrete=True)

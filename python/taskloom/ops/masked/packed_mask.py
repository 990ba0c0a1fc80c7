"""Bit-packed masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taskloom.ops._backends import kernel
from taskloom.ops._checks import check_dtype, check_packed, packed_bytes
from taskloom.ops._register import register
from taskloom.reference import masked as reference


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a bool mask into bits.

    Parameters
    ----------
    mask
        Bool tensor of any shape.

    Returns
    -------
    Tensor
        uint8 of shape ``[ceil(numel / 8)]``: entry i of the flattened mask is bit ``i % 8`` of byte ``i // 8``, counted from the least
        significant (``numpy.packbits(bitorder="little")``); the bits after the last entry are zero.

    Raises
    ------
    TypeError
        If ``mask`` is no bool tensor.
    """
    check_dtype("pack_mask", "mask", mask, torch.bool)
    run = kernel("pack_mask", mask)
    if run is None:
        return reference.pack_mask(mask)
    packed: Tensor = run(mask)
    return packed


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Unpack what :func:`pack_mask` packed.

    Parameters
    ----------
    packed
        uint8 of shape ``[ceil(numel / 8)]``; bits after the last entry are not looked at.
    shape
        Of the mask.

    Returns
    -------
    Tensor
        Bool tensor of ``shape``.

    Raises
    ------
    TypeError
        If ``packed`` is no uint8 tensor.
    ValueError
        If a size is negative or ``packed`` has another number of bytes than the shape needs.
    """
    numel = 1
    for size in shape:
        if size < 0:
            raise ValueError(f"unpack_mask: shape: sizes must not be negative, got {tuple(shape)}")
        numel *= size
    check_packed("unpack_mask", "packed", packed, numel)
    run = kernel("unpack_mask", packed)
    if run is None:
        return reference.unpack_mask(packed, shape)
    mask: Tensor = run(packed, shape)
    return mask


def _fake_pack_mask(mask: Tensor) -> Tensor:
    return mask.new_empty((packed_bytes(mask.numel()),), dtype=torch.uint8)


def _fake_unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    return packed.new_empty(tuple(shape), dtype=torch.bool)


register("pack_mask", fake=_fake_pack_mask, discrete=True)
register("unpack_mask", fake=_fake_unpack_mask, discrete=True)

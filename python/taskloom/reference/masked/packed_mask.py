"""Bit-packed masks in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack_mask(mask: Tensor) -> Tensor:
    """Bool entries as bits: entry i is bit i % 8, counted from the least significant, of byte i // 8; the tail is zero."""
    numel = mask.numel()
    padded = torch.nn.functional.pad(mask.reshape(-1).to(torch.uint8), (0, -numel % 8))
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.reshape(-1, 8) << places).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The bits of :func:`pack_mask` as a bool tensor of ``shape``."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.reshape(-1, 1) >> places) & 1
    numel = torch.Size(shape).numel()
    return bits.reshape(-1)[:numel].bool().reshape(shape)

"""The entries that a packed mask sets, next to each other, and back, in plain torch."""

from __future__ import annotations

from torch import Tensor

from taskloom.reference.masked.packed_mask import unpack_mask


def masked_compress(values: Tensor, packed: Tensor) -> Tensor:
    """The values at set entries, in order."""
    return values.reshape(-1)[unpack_mask(packed, (values.numel(),))]


def masked_restore(compressed: Tensor, packed: Tensor, base: Tensor) -> Tensor:
    """Base with its set entries replaced by ``compressed``, in order."""
    return base.masked_scatter(unpack_mask(packed, base.shape), compressed)

"""The masked family in plain torch."""

from __future__ import annotations

from taskloom.reference.masked.magnitude_threshold import magnitude_histogram, magnitude_mask, magnitude_threshold
from taskloom.reference.masked.packed_mask import pack_mask, unpack_mask
from taskloom.reference.masked.sparse_merge import sparse_merge

__all__ = [
    "magnitude_histogram",
    "magnitude_mask",
    "magnitude_threshold",
    "pack_mask",
    "sparse_merge",
    "unpack_mask",
]

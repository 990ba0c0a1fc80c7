"""The masked family: sparse masked updates and merges of task vectors."""

from __future__ import annotations

from taskloom.ops.masked.magnitude_mask import magnitude_mask
from taskloom.ops.masked.magnitude_threshold import (
    MagnitudeThreshold,
    magnitude_histogram,
    magnitude_threshold,
    split_threshold,
    threshold_from_histograms,
)
from taskloom.ops.masked.packed_mask import pack_mask, unpack_mask
from taskloom.ops.masked.sparse_merge import sparse_merge

__all__ = [
    "MagnitudeThreshold",
    "magnitude_histogram",
    "magnitude_mask",
    "magnitude_threshold",
    "pack_mask",
    "sparse_merge",
    "split_threshold",
    "threshold_from_histograms",
    "unpack_mask",
]

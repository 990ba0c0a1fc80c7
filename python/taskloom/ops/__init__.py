"""Drop-in torch ops in four families. Importing this package loads the op libraries and registers every op."""

from __future__ import annotations

from taskloom.ops._backends import Explanation, backend, explain
from taskloom.ops.masked import (
    MagnitudeThreshold,
    magnitude_histogram,
    magnitude_mask,
    magnitude_threshold,
    pack_mask,
    sparse_merge,
    split_threshold,
    threshold_from_histograms,
    unpack_mask,
)

__all__ = [
    "Explanation",
    "MagnitudeThreshold",
    "backend",
    "explain",
    "magnitude_histogram",
    "magnitude_mask",
    "magnitude_threshold",
    "pack_mask",
    "sparse_merge",
    "split_threshold",
    "threshold_from_histograms",
    "unpack_mask",
]

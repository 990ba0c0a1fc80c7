"""Drop-in torch ops in four families. Importing this package loads the op libraries and registers every op."""

from __future__ import annotations

from taskloom.ops._backends import Explanation, backend, explain
from taskloom.ops.masked import (
    MagnitudeThreshold,
    block_scale_merge,
    magnitude_histogram,
    magnitude_mask,
    magnitude_threshold,
    mask_count,
    masked_adamw_,
    masked_compress,
    masked_restore,
    masked_sgd_,
    masked_switch_,
    masked_update,
    masked_update_,
    multi_task_vector,
    pack_mask,
    sparse_merge,
    split_threshold,
    task_mask,
    threshold_from_histograms,
    unpack_mask,
)

__all__ = [
    "Explanation",
    "MagnitudeThreshold",
    "backend",
    "block_scale_merge",
    "explain",
    "magnitude_histogram",
    "magnitude_mask",
    "magnitude_threshold",
    "mask_count",
    "masked_adamw_",
    "masked_compress",
    "masked_restore",
    "masked_sgd_",
    "masked_switch_",
    "masked_update",
    "masked_update_",
    "multi_task_vector",
    "pack_mask",
    "sparse_merge",
    "split_threshold",
    "task_mask",
    "threshold_from_histograms",
    "unpack_mask",
]

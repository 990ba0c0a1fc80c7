"""The masked family: sparse masked updates and merges of task vectors."""

from __future__ import annotations

from taskloom.ops.masked.block_scale_merge import block_scale_merge, block_scale_merge_backward
from taskloom.ops.masked.magnitude_mask import magnitude_mask
from taskloom.ops.masked.magnitude_threshold import (
    MagnitudeThreshold,
    magnitude_histogram,
    magnitude_threshold,
    split_threshold,
    threshold_from_histograms,
)
from taskloom.ops.masked.mask_count import mask_count
from taskloom.ops.masked.masked_compress import masked_compress, masked_restore
from taskloom.ops.masked.masked_step import masked_adamw_, masked_sgd_
from taskloom.ops.masked.masked_switch import masked_switch_
from taskloom.ops.masked.masked_update import masked_update, masked_update_
from taskloom.ops.masked.multi_task_vector import multi_task_vector
from taskloom.ops.masked.packed_mask import pack_mask, unpack_mask
from taskloom.ops.masked.sparse_merge import SparseMergeStatistics, sparse_merge
from taskloom.ops.masked.task_mask import task_mask
from taskloom.ops.masked.weighted_ce import weighted_ce, weighted_ce_backward

__all__ = [
    "MagnitudeThreshold",
    "SparseMergeStatistics",
    "block_scale_merge",
    "block_scale_merge_backward",
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
    "weighted_ce",
    "weighted_ce_backward",
]

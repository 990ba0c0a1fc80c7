"""The masked family in plain torch."""

from __future__ import annotations

from taskloom.reference.masked.block_scale_merge import block_scale_merge, block_scale_merge_backward
from taskloom.reference.masked.magnitude_threshold import magnitude_histogram, magnitude_mask, magnitude_threshold
from taskloom.reference.masked.mask_count import mask_count
from taskloom.reference.masked.masked_compress import masked_compress, masked_restore
from taskloom.reference.masked.masked_step import masked_adamw_, masked_sgd_
from taskloom.reference.masked.masked_switch import masked_switch_
from taskloom.reference.masked.masked_update import masked_update, masked_update_
from taskloom.reference.masked.multi_task_vector import multi_task_vector
from taskloom.reference.masked.packed_mask import pack_mask, unpack_mask
from taskloom.reference.masked.sparse_merge import sparse_merge, sparse_merge_statistics
from taskloom.reference.masked.task_mask import task_mask
from taskloom.reference.masked.weighted_ce import weighted_ce, weighted_ce_backward

__all__ = [
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
    "sparse_merge_statistics",
    "task_mask",
    "unpack_mask",
    "weighted_ce",
    "weighted_ce_backward",
]

"""Launchers of the masked family's Triton kernels, with the arguments of the ops of the same names in ``torch.ops.taskloom``."""

from __future__ import annotations

from taskloom.triton_kernels.masked.block_scale_merge import block_scale_merge, block_scale_merge_backward
from taskloom.triton_kernels.masked.magnitude_mask import magnitude_mask
from taskloom.triton_kernels.masked.magnitude_threshold import magnitude_histogram, magnitude_threshold
from taskloom.triton_kernels.masked.mask_count import mask_count
from taskloom.triton_kernels.masked.masked_compress import masked_compress, masked_restore
from taskloom.triton_kernels.masked.masked_step import masked_adamw_, masked_sgd_
from taskloom.triton_kernels.masked.masked_switch import masked_switch_
from taskloom.triton_kernels.masked.masked_update import masked_update, masked_update_
from taskloom.triton_kernels.masked.multi_task_vector import multi_task_vector
from taskloom.triton_kernels.masked.packed_mask import pack_mask, unpack_mask
from taskloom.triton_kernels.masked.sparse_merge import sparse_merge, sparse_merge_out, sparse_merge_statistics_out
from taskloom.triton_kernels.masked.task_mask import task_mask
from taskloom.triton_kernels.masked.weighted_ce import weighted_ce, weighted_ce_backward

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
    "sparse_merge_out",
    "sparse_merge_statistics_out",
    "task_mask",
    "unpack_mask",
    "weighted_ce",
    "weighted_ce_backward",
]

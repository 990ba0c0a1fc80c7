"""The masked family: sparse masked updates and merges of task vectors."""

from __future__ import annotations

from taskloom.ops.masked.mask_count import mask_count
from taskloom.ops.masked.multi_task_vector import multi_task_vector
from taskloom.ops.masked.packed_mask import pack_mask, unpack_mask
from taskloom.ops.masked.task_mask import task_mask

__all__ = [
    "mask_count",
    "multi_task_vector",
    "pack_mask",
    "task_mask",
    "unpack_mask",
]

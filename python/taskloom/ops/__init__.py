"""Drop-in torch ops in four families. Importing this package loads the op libraries and registers every op."""

from __future__ import annotations

from taskloom.ops._backends import Explanation, backend, explain
from taskloom.ops.masked import (
    block_scale_merge,
    mask_count,
    masked_compress,
    masked_restore,
    masked_switch_,
    masked_update,
    masked_update_,
    multi_task_vector,
    pack_mask,
    task_mask,
    unpack_mask,
)

__all__ = [
    "Explanation",
    "backend",
    "block_scale_merge",
    "explain",
    "mask_count",
    "masked_compress",
    "masked_restore",
    "masked_switch_",
    "masked_update",
    "masked_update_",
    "multi_task_vector",
    "pack_mask",
    "task_mask",
    "unpack_mask",
]

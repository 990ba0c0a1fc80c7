"""TALL masks: many fine-tunings of one base as one shared vector and one bit per entry and task; and merging by their consensus.

The masks, the vector and the archive are the library's own layer ``taskloom.archive``, which ``taskloom compress`` writes with.

Source: "Localizing Task Information for Improved Model Merging and Compression", Wang et al., ICML 2024, arXiv 2405.07813.
"""

from __future__ import annotations

from taskloom.archive.memory import TallArchive
from taskloom.archive.packed import PackedMask
from taskloom.archive.select import LAMBDA_GRID, select_lambda
from taskloom.archive.tasks import multi_task_vector, restore_task, tall_masks
from taskloom.methods.merging.tall_masks.consensus import consensus_mask, mask_profile, merge_consensus
from taskloom.methods.merging.tall_masks.magnitude import magnitude_masks

__all__ = [
    "LAMBDA_GRID",
    "PackedMask",
    "TallArchive",
    "consensus_mask",
    "magnitude_masks",
    "mask_profile",
    "merge_consensus",
    "multi_task_vector",
    "restore_task",
    "select_lambda",
    "tall_masks",
]

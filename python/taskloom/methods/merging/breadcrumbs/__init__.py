"""Model Breadcrumbs: merging with the largest and the small entries of every task vector masked out.

Source: Davari and Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", 2023 (ECCV 2024), arXiv 2312.06795.
"""

from __future__ import annotations

from taskloom.methods.merging.breadcrumbs.mask import breadcrumbs_, breadcrumbs_mask
from taskloom.methods.merging.breadcrumbs.merge import merge_breadcrumbs

__all__ = ["breadcrumbs_", "breadcrumbs_mask", "merge_breadcrumbs"]

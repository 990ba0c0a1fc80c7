"""Reversible merging of low-rank adapters: shared bases at each position of the factors, from which each task's adapter comes back.

Source: Alipour and Amiri, "Towards Reversible Model Merging For Low-rank Weights", 2025, arXiv 2510.14163.
"""

from __future__ import annotations

from taskloom.methods.merging.rmm.baselines import merge_products, merge_separate
from taskloom.methods.merging.rmm.fit import fit_rmm
from taskloom.methods.merging.rmm.linear import RMMLinear
from taskloom.methods.merging.rmm.sources import from_checkpoints, from_peft
from taskloom.methods.merging.rmm.space import RMMSpace

__all__ = ["RMMLinear", "RMMSpace", "fit_rmm", "from_checkpoints", "from_peft", "merge_products", "merge_separate"]

"""Optimisers that step the active entries of parameters only, and the masks that say which these are."""

from __future__ import annotations

from taskloom.optim.masked_adamw import MaskedAdamW
from taskloom.optim.masked_sgd import MaskedSGD
from taskloom.optim.topk_mask import nm_mask, topk_mask

__all__ = ["MaskedAdamW", "MaskedSGD", "nm_mask", "topk_mask"]

"""Optimisers that step the active entries of parameters only, and the masks that say which these are."""

from __future__ import annotations

from taskloom.optim.masked_adamw import MaskedAdamW
from taskloom.optim.masked_sgd import MaskedSGD
from taskloom.optim.rewrite import chunk_update_, forget_rows_, prune_and_rewind_
from taskloom.optim.topk_mask import nm_mask, topk_mask

__all__ = ["MaskedAdamW", "MaskedSGD", "chunk_update_", "forget_rows_", "nm_mask", "prune_and_rewind_", "topk_mask"]

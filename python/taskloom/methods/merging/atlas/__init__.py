"""aTLAS: a model's weights from task vectors, with one learned coefficient for each vector and block.

Source: Zhang et al., "Knowledge Composition using Task Vectors with Learned Anisotropic Scaling", NeurIPS 2024, arXiv 2407.02880.
"""

from __future__ import annotations

from taskloom.methods.merging.atlas.config import AtlasConfig, load_atlas, save_atlas
from taskloom.methods.merging.atlas.few_shot import choose_shots, pool_without, repeat_shots
from taskloom.methods.merging.atlas.losses import multi_task_loss, negation_loss, ufm_loss
from taskloom.methods.merging.atlas.lowrank import LowRankTaskVector
from taskloom.methods.merging.atlas.lowrank_model import LowRankAtlasModel
from taskloom.methods.merging.atlas.mixing import BlockGradients, block_gradients, mix_blocks, select_blocks
from taskloom.methods.merging.atlas.model import AtlasModel
from taskloom.methods.merging.atlas.partition import draw_groups
from taskloom.methods.merging.atlas.selection import BestCoefficients, Negation, normalised_accuracy
from taskloom.methods.merging.atlas.trusted import TrustedBatches, TrustedSamples, select_trusted

__all__ = [
    "AtlasConfig",
    "AtlasModel",
    "BestCoefficients",
    "BlockGradients",
    "LowRankAtlasModel",
    "LowRankTaskVector",
    "Negation",
    "TrustedBatches",
    "TrustedSamples",
    "block_gradients",
    "choose_shots",
    "draw_groups",
    "load_atlas",
    "mix_blocks",
    "multi_task_loss",
    "negation_loss",
    "normalised_accuracy",
    "pool_without",
    "repeat_shots",
    "save_atlas",
    "select_blocks",
    "select_trusted",
    "ufm_loss",
]

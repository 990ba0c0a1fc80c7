"""aTLAS: a model's weights from task vectors, with one learned coefficient for each vector and block.

Source: Zhang et al., "Knowledge Composition using Task Vectors with Learned Anisotropic Scaling", NeurIPS 2024, arXiv 2407.02880.
"""

from __future__ import annotations

from taskloom.methods.merging.atlas.config import AtlasConfig, load_atlas, save_atlas
from taskloom.methods.merging.atlas.lowrank import LowRankTaskVector
from taskloom.methods.merging.atlas.lowrank_model import LowRankAtlasModel
from taskloom.methods.merging.atlas.mixing import BlockGradients, block_gradients, mix_blocks, select_blocks
from taskloom.methods.merging.atlas.model import AtlasModel
from taskloom.methods.merging.atlas.partition import draw_groups

__all__ = [
    "AtlasConfig",
    "AtlasModel",
    "BlockGradients",
    "LowRankAtlasModel",
    "LowRankTaskVector",
    "block_gradients",
    "draw_groups",
    "load_atlas",
    "mix_blocks",
    "save_atlas",
    "select_blocks",
]

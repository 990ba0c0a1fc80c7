"""aTLAS: a model's weights from task vectors, with one learned coefficient for each vector and block.

Source: Zhang et al., "Knowledge Composition using Task Vectors with Learned Anisotropic Scaling", NeurIPS 2024, arXiv 2407.02880.
"""

from __future__ import annotations

from taskloom.methods.merging.atlas.model import AtlasModel

__all__ = ["AtlasModel"]

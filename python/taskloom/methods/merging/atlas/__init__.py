"""aTLAS: a model's weights from task vectors, with one learned coefficient for each vector and block.

Source: Zhang et al., "Knowledge Composition using Task Vectors with Learned Anisotropic Scaling", NeurIPS 2024, arXiv 2407.02880.
"""

from __future__ import annotations

from taskloom.methods.merging.atlas.few_shot import choose_shots, pool_without, repeat_shots
from taskloom.methods.merging.atlas.losses import multi_task_loss, negation_loss, ufm_loss
from taskloom.methods.merging.atlas.model import AtlasModel
from taskloom.methods.merging.atlas.selection import BestCoefficients, Negation, normalised_accuracy
from taskloom.methods.merging.atlas.trusted import TrustedBatches, TrustedSamples, select_trusted

__all__ = [
    "AtlasModel",
    "BestCoefficients",
    "Negation",
    "TrustedBatches",
    "TrustedSamples",
    "choose_shots",
    "multi_task_loss",
    "negation_loss",
    "normalised_accuracy",
    "pool_without",
    "repeat_shots",
    "select_trusted",
    "ufm_loss",
]

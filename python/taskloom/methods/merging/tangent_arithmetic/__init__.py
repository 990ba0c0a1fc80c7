"""Task arithmetic in the tangent space: fine-tune and edit a model's first-order expansion, and measure how task vectors interfere.

Source: Ortiz-Jimenez, Favero, Frossard, "Task Arithmetic in the Tangent Space: Improved Editing of Pre-Trained Models", NeurIPS 2023,
arXiv 2305.12827.
"""

from __future__ import annotations

from taskloom.methods.merging.tangent_arithmetic.disentanglement import disentanglement_error, nonlinear_advantage
from taskloom.methods.merging.tangent_arithmetic.edited import EditedModel
from taskloom.methods.merging.tangent_arithmetic.linearized import LinearizedModel
from taskloom.methods.merging.tangent_arithmetic.ntk import LocalEnergy, local_energy, ntk_matrix
from taskloom.methods.merging.tangent_arithmetic.search import AlphaRow, Control, search_alpha

__all__ = [
    "AlphaRow",
    "Control",
    "EditedModel",
    "LinearizedModel",
    "LocalEnergy",
    "disentanglement_error",
    "local_energy",
    "nonlinear_advantage",
    "ntk_matrix",
    "search_alpha",
]

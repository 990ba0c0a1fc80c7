"""Routing manifold alignment: routers tuned so that a sample is routed like its neighbours that the model answers correctly.

Source: "Routing Manifold Alignment Improves Generalization of Mixture-of-Experts LLMs", ICLR 2026, arXiv 2511.07419.
"""

from __future__ import annotations

from taskloom.methods.routing.roma.c3po import RoutingOverride, c3po_reweight
from taskloom.methods.routing.roma.config import RoMAConfig
from taskloom.methods.routing.roma.neighbors import Neighbors, neighbor_weights, random_neighbors
from taskloom.methods.routing.roma.recorder import RoutingRecorder
from taskloom.methods.routing.roma.reference import ReferenceSet, build_reference, refresh_reference
from taskloom.methods.routing.roma.routers import find_routers, train_only_routers
from taskloom.methods.routing.roma.tokens import token_positions
from taskloom.methods.routing.roma.tune import tune_routers
from taskloom.ops import manifold_loss

__all__ = [
    "Neighbors",
    "ReferenceSet",
    "RoMAConfig",
    "RoutingOverride",
    "RoutingRecorder",
    "build_reference",
    "c3po_reweight",
    "find_routers",
    "manifold_loss",
    "neighbor_weights",
    "random_neighbors",
    "refresh_reference",
    "token_positions",
    "train_only_routers",
    "tune_routers",
]

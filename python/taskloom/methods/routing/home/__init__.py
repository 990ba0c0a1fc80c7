"""HoME: a hierarchy of multi-gate experts for many tasks in categories, and the models that it is compared with.

Source: "HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at Kuaishou", arXiv 2408.05430. There is no official code; what was
inferred is said where it is.
"""

from __future__ import annotations

from taskloom.methods.routing.home.baselines import CGC, PLE, MMoE
from taskloom.methods.routing.home.experts import ExpertPool, HoMEExpert
from taskloom.methods.routing.home.model import GatedLevel, HoME, LevelReport
from taskloom.methods.routing.home.tasks import multi_task_loss
from taskloom.nn import FeatureGate, MultiGateMoE, SelfGate

__all__ = [
    "CGC",
    "PLE",
    "ExpertPool",
    "FeatureGate",
    "GatedLevel",
    "HoME",
    "HoMEExpert",
    "LevelReport",
    "MMoE",
    "MultiGateMoE",
    "SelfGate",
    "multi_task_loss",
]

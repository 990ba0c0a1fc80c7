"""Controllable multi-task networks: one set of weights whose encoder and decoders run at widths that a preference and a budget choose.

Source: "Efficient Controllable Multi-Task Architectures", ICCV 2023, arXiv 2308.11744. There is no official code; what was inferred is said
where it is.
"""

from __future__ import annotations

from taskloom.methods.channels.controllable_mtl.config import WidthConfig
from taskloom.methods.channels.controllable_mtl.deploy import calibrate, export
from taskloom.methods.channels.controllable_mtl.distill import ci_kd_loss
from taskloom.methods.channels.controllable_mtl.evolve import Evolution
from taskloom.methods.channels.controllable_mtl.flops import FlopTable, count_flops
from taskloom.methods.channels.controllable_mtl.hypervolume import hypervolume
from taskloom.methods.channels.controllable_mtl.model import SlimMultiTask
from taskloom.methods.channels.controllable_mtl.preference import InfeasibleBudget, decoder_levels
from taskloom.methods.channels.controllable_mtl.search import SearchInfo, WidthSearch, search_widths
from taskloom.methods.channels.controllable_mtl.train import sandwich_step
from taskloom.nn import SlimConv2d, SlimLinear, SlimNorm2d, make_divisible

__all__ = [
    "Evolution",
    "FlopTable",
    "InfeasibleBudget",
    "SearchInfo",
    "SlimConv2d",
    "SlimLinear",
    "SlimMultiTask",
    "SlimNorm2d",
    "WidthConfig",
    "WidthSearch",
    "calibrate",
    "ci_kd_loss",
    "count_flops",
    "decoder_levels",
    "export",
    "hypervolume",
    "make_divisible",
    "sandwich_step",
    "search_widths",
]

"""Modules made of the ops: adapters beside layers, their way into a model and onto the disk; layers of some channels or changing width;
routers, gates and experts.
"""

from __future__ import annotations

from taskloom.nn.adapter_files import adapter_state_dict, load_adapter, save_adapter
from taskloom.nn.expert_mlp import ExpertMLP, GatedMLP
from taskloom.nn.feature_gate import FeatureGate
from taskloom.nn.fused_linear import SplitLinear, split_fused
from taskloom.nn.inject import LayerConfig, inject
from taskloom.nn.kernel_linear import KernelConfig, KernelLinear
from taskloom.nn.lowrank_config import LowRankConfig
from taskloom.nn.lowrank_linear import LowRankLinear
from taskloom.nn.lowrank_parts import BASE
from taskloom.nn.multi_gate import MultiGateMoE, SelfGate
from taskloom.nn.router import TopKRouter
from taskloom.nn.router_patch import RouterPatch, patch_routers, unpatch_routers
from taskloom.nn.slim_calibrate import calibrate
from taskloom.nn.slim_export import export
from taskloom.nn.slim_layers import SlimConv2d, SlimLinear
from taskloom.nn.slim_norm2d import SlimNorm2d
from taskloom.nn.slim_widths import Width, Widths, make_divisible, use_width
from taskloom.nn.stacked_experts import StackedBatchNormSiLU, StackedExperts
from taskloom.nn.task_window import RoutedResidual, TaskWindow
from taskloom.nn.use_tasks import use_tasks
from taskloom.nn.window_layers import WindowConv2d, WindowLinear

__all__ = [
    "BASE",
    "ExpertMLP",
    "FeatureGate",
    "GatedMLP",
    "KernelConfig",
    "KernelLinear",
    "LayerConfig",
    "LowRankConfig",
    "LowRankLinear",
    "MultiGateMoE",
    "RoutedResidual",
    "RouterPatch",
    "SelfGate",
    "SlimConv2d",
    "SlimLinear",
    "SlimNorm2d",
    "SplitLinear",
    "StackedBatchNormSiLU",
    "StackedExperts",
    "TaskWindow",
    "TopKRouter",
    "Width",
    "Widths",
    "WindowConv2d",
    "WindowLinear",
    "adapter_state_dict",
    "calibrate",
    "export",
    "inject",
    "load_adapter",
    "make_divisible",
    "patch_routers",
    "save_adapter",
    "split_fused",
    "unpatch_routers",
    "use_tasks",
    "use_width",
]

"""Modules made of the ops: adapters beside linear layers, their way into a model and onto the disk, and layers that see some channels."""

from __future__ import annotations

from taskloom.nn.adapter_files import adapter_state_dict, load_adapter, save_adapter
from taskloom.nn.fused_linear import SplitLinear, split_fused
from taskloom.nn.inject import LayerConfig, inject
from taskloom.nn.kernel_linear import KernelConfig, KernelLinear
from taskloom.nn.lowrank_config import LowRankConfig
from taskloom.nn.lowrank_linear import LowRankLinear
from taskloom.nn.lowrank_parts import BASE
from taskloom.nn.task_window import RoutedResidual, TaskWindow
from taskloom.nn.use_tasks import use_tasks
from taskloom.nn.window_layers import WindowConv2d, WindowLinear

__all__ = [
    "BASE",
    "KernelConfig",
    "KernelLinear",
    "LayerConfig",
    "LowRankConfig",
    "LowRankLinear",
    "RoutedResidual",
    "SplitLinear",
    "TaskWindow",
    "WindowConv2d",
    "WindowLinear",
    "adapter_state_dict",
    "inject",
    "load_adapter",
    "save_adapter",
    "split_fused",
    "use_tasks",
]

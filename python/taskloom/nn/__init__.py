"""Modules made of the ops: adapters beside linear layers, and their way into a model and onto the disk.

Importing this package imports nothing; a module is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskloom.nn.adapter_files import adapter_state_dict, load_adapter, save_adapter
    from taskloom.nn.fused_linear import SplitLinear, split_fused
    from taskloom.nn.inject import LayerConfig, inject
    from taskloom.nn.kernel_linear import KernelConfig, KernelLinear
    from taskloom.nn.lowrank_config import LowRankConfig
    from taskloom.nn.lowrank_linear import LowRankLinear
    from taskloom.nn.lowrank_parts import BASE
    from taskloom.nn.use_tasks import use_tasks

__all__ = [
    "BASE",
    "KernelConfig",
    "KernelLinear",
    "LayerConfig",
    "LowRankConfig",
    "LowRankLinear",
    "SplitLinear",
    "adapter_state_dict",
    "inject",
    "load_adapter",
    "save_adapter",
    "split_fused",
    "use_tasks",
]

_MODULES = {
    "BASE": "lowrank_parts",
    "KernelConfig": "kernel_linear",
    "KernelLinear": "kernel_linear",
    "LayerConfig": "inject",
    "LowRankConfig": "lowrank_config",
    "LowRankLinear": "lowrank_linear",
    "SplitLinear": "fused_linear",
    "adapter_state_dict": "adapter_files",
    "inject": "inject",
    "load_adapter": "adapter_files",
    "save_adapter": "adapter_files",
    "split_fused": "fused_linear",
    "use_tasks": "use_tasks",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _MODULES:
        raise AttributeError(f"module 'taskloom.nn' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"taskloom.nn.{_MODULES[name]}"), name)
    # Importing a module of the same name has put that module here.
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

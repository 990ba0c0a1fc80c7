"""Modules made of ops. Importing this package imports nothing; a module is imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskloom.nn.kernel_linear import KernelConfig, KernelLinear

__all__ = ["KernelConfig", "KernelLinear"]

_MODULES = {"KernelConfig": "kernel_linear", "KernelLinear": "kernel_linear"}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _MODULES:
        return getattr(importlib.import_module(f"taskloom.nn.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'taskloom.nn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

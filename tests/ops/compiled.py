"""Compiles functions for tests: traced whole, with sizes that are symbols, and run without a code generator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under torch.compile(fullgraph=True, dynamic=True)."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")

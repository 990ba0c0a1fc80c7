"""Runs of kernels that look at their windows themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from taskloom.ops.routed._windows import OutWindow, Window, check_values


def run_checked(op: str, samples: int, channels: int, window: Window | OutWindow, run: Callable[..., Any], *arguments: Any) -> Any:
    """Run a kernel; where it found a window that leaves the channels, say so in the wrapper's words."""
    try:
        return run(*arguments)
    except RuntimeError:
        if not torch.compiler.is_compiling():
            check_values(op, samples, channels, window)
        raise

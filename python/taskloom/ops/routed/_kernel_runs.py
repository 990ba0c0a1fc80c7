"""Runs of kernels that look at their windows themselves; and whether windows are worth taking out of a product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from taskloom.ops._backends import active_transform
from taskloom.ops.routed._windows import OutWindow, Window, check_values


def run_checked(op: str, samples: int, channels: int, window: Window | OutWindow, run: Callable[..., Any], *arguments: Any) -> Any:
    """Run a kernel; where it found a window that leaves the channels, say so in the wrapper's words."""
    try:
        return run(*arguments)
    except RuntimeError:
        if not torch.compiler.is_compiling():
            check_values(op, samples, channels, window)
        raise


def sees_at_least(share: float, channels: int, window: Window) -> bool:
    """Whether the windows hold that share of all channels; no where that is not known, in a traced graph or under a transform."""
    _, width, widths = window
    if widths is None:
        return width >= share * channels
    if torch.compiler.is_compiling() or active_transform() is not None or widths.numel() == 0:
        return False
    return float(widths.float().mean()) >= share * channels


def share_seen(channels: int, window: Window) -> float:
    """The share of all channels that is in the windows."""
    _, width, widths = window
    return (width if widths is None else float(widths.float().mean())) / max(channels, 1)

"""What the kernels of the routed norms share: a sample's window, and pieces of its rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def window_of(start, widths, sample, width, WIDTHS: tl.constexpr):
    """First channel of a sample's window, and the one after its last."""
    low = tl.load(start + sample).to(tl.int64)
    size = tl.load(widths + sample).to(tl.int64) if WIDTHS else width
    return low, low + size


@triton.jit
def square_root(x, WIDE: tl.constexpr):
    """The square root, rounded to nearest: Triton's own of float32 is approximate."""
    root = tl.sqrt(x) if WIDE else tl.sqrt_rn(x)
    return root


def checked_start(op: str, start: Tensor, width: int, widths: Tensor | None, channels: int) -> Tensor:
    """Start, contiguous; a window that leaves the channels is a device-side assertion."""
    size = width if widths is None else widths
    within = (start >= 0) & (start <= channels - size)
    if widths is not None:
        within &= (widths >= 1) & (widths <= channels)
    if start.is_cpu and not bool(within.all()):
        raise RuntimeError(f"{op}: start, width: expected windows within 0 to {channels} channels")
    if not start.is_cpu:
        torch._assert_async(within.all(), f"{op}: start, width: expected windows within 0 to {channels} channels")
    return start.contiguous()

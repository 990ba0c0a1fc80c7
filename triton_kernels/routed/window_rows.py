"""What the kernels of the routed norms share: a sample's window, and pieces of its rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from taskloom.ops.routed._windows import OutWindow, assert_values, check_values


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


def window_tables(op: str, samples: int, channels: int, window: OutWindow) -> tuple[Tensor, Tensor]:
    """Starts and widths as kernels read them, one for each sample; a window that leaves the channels is a device-side assertion."""
    start, _, widths = window
    assert start is not None
    if start.is_cpu:
        check_values(op, samples, channels, window)
    else:
        assert_values(op, channels, window)
    starts = start.expand(samples).contiguous()
    return starts, starts if widths is None else widths.expand(samples).contiguous()

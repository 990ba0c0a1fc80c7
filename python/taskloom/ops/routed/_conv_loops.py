"""window_conv2d on the CPU by loops of our own: weights packed once for all windows, no columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from taskloom.ops import _library
from taskloom.ops.routed._products import product_dtype
from taskloom.ops.routed._windows import Group

if TYPE_CHECKING:
    from taskloom.ops.routed._conv_products import Geometry

# The level where they were faster at every size; at v3 they were about as fast as products, at v2 they call a function for every fused
# multiply-add.
LEVEL = "v4"
# From this share of the channels on torch's own convolution is the faster one.
DENSE_FROM = 0.85
# Fewer outputs leave lanes of the loops without work.
LEAST_OUTPUTS = 16


def are_faster(x: Tensor, outputs: int, geometry: Geometry) -> bool:
    """Whether the loops are faster than products of columns: what benchmarks/bench_window_crossover.py showed."""
    return (
        product_dtype(x.dtype) == torch.float32
        and geometry.taps > 1
        and outputs >= LEAST_OUTPUTS
        and x.is_contiguous()
        and _library.cpu_level() == LEVEL
    )


def _windows(samples: int, planned: Sequence[Group], turned: bool) -> Tensor:
    """First channel, channels, first output and outputs of each sample, [N, 4]."""
    windows = torch.empty((samples, 4), dtype=torch.int64)
    for group in planned:
        seen, made = (group.made, group.seen) if turned else (group.seen, group.made)
        windows[group.samples] = torch.tensor([seen.start, seen.stop - seen.start, made.start, made.stop - made.start])
    return windows


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, planned: Sequence[Group], geometry: Geometry, y: Tensor) -> None:
    """Write to y [N, O, H', W'] what the groups' samples see, and nothing outside the outputs of their windows."""
    beside = None if bias is None else bias.contiguous()
    sizes = (list(geometry.stride), list(geometry.padding), list(geometry.dilation))
    windows = _windows(len(x), planned, turned=False)
    torch.ops.taskloom_loops.window_conv2d.default(x, weight.contiguous(), beside, windows, *sizes, False, y)


def _beside(geometry: Geometry) -> list[int]:
    """The padding with which the turned kernel gives x's gradient."""
    return [apart * (taps - 1) - beside for apart, taps, beside in zip(geometry.dilation, geometry.kernel, geometry.padding, strict=True)]


def are_faster_backward(gradient: Tensor, planned: Sequence[Group], geometry: Geometry) -> bool:
    """The same for x's gradient, which is a convolution where the stride is 1."""
    narrowest = min((group.width for group in planned if group.width), default=0)
    return geometry.stride == (1, 1) and min(_beside(geometry)) >= 0 and are_faster(gradient, narrowest, geometry)


def convolve_backward(gradient: Tensor, weight: Tensor, planned: Sequence[Group], geometry: Geometry, made: Tensor) -> None:
    """Write to made [N, C, H, W] the gradient of what the groups' samples see, and nothing outside of it."""
    sizes = ([1, 1], _beside(geometry), list(geometry.dilation))
    windows = _windows(len(gradient), planned, turned=True)
    torch.ops.taskloom_loops.window_conv2d.default(gradient, weight.contiguous(), None, windows, *sizes, True, made)

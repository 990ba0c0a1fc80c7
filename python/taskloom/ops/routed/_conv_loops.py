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


def are_faster(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether the loops are faster than products of columns: what benchmarks/bench_window_crossover.py showed."""
    return (
        product_dtype(x.dtype) == torch.float32
        and geometry.taps > 1
        and len(weight) >= LEAST_OUTPUTS
        and x.is_contiguous()
        and _library.cpu_level() == LEVEL
    )


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, planned: Sequence[Group], geometry: Geometry, y: Tensor) -> None:
    """Write to y [N, O, H', W'] what the groups' samples see, and nothing outside the outputs of their windows."""
    windows = torch.empty((len(x), 4), dtype=torch.int64)
    for group in planned:
        seen, made = group.seen, group.made
        windows[group.samples] = torch.tensor([seen.start, seen.stop - seen.start, made.start, made.stop - made.start])
    beside = None if bias is None else bias.contiguous()
    sizes = (list(geometry.stride), list(geometry.padding), list(geometry.dilation))
    torch.ops.taskloom_loops.window_conv2d.default(x, weight.contiguous(), beside, windows, *sizes, y)

"""window_conv2d on the CPU by oneDNN: a convolution of views for each run of samples that have one window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from taskloom.ops.routed._products import in_rows, onednn_dtypes, product_dtype, tiles
from taskloom.ops.routed._windows import Group
from taskloom.reference.arithmetic import accumulation_dtype

if TYPE_CHECKING:
    from taskloom.ops.routed._conv_products import Geometry

# float32 goes this way where runs have so many samples, bfloat16 always: what benchmarks/bench_window_crossover.py showed, as all of these.
LEAST_RUN = 4
# Pixels in whose time oneDNN lays a weight out for itself: forward; and backward, where it makes a gradient of it too.
PIXELS_OF_WEIGHT, PIXELS_OF_WEIGHT_BACKWARD = 80, 128
# Products in whose time a convolution is called.
PRODUCTS_OF_CALL = 5_000_000


def _runs(planned: Sequence[Group]) -> Iterator[tuple[Group, slice]]:
    """Samples next to each other that have one window, and outputs of it."""
    for group in planned:
        if group.width and group.made.stop > group.made.start:
            for begin, end in group.runs():
                yield group, slice(begin, end)


def is_faster(planned: Sequence[Group], x: Tensor, geometry: Geometry) -> bool:
    """Whether oneDNN is faster than loops and products of our own."""
    if x.dtype not in onednn_dtypes() or product_dtype(x.dtype) != x.dtype or 0 in x.shape or not geometry.taps:
        return False
    return x.dtype == torch.bfloat16 or len(x) >= LEAST_RUN * sum(1 for _ in _runs(planned))


def window_costs(planned: Sequence[Group], x: Tensor, outputs: int, geometry: Geometry, backward: bool) -> tuple[int, int]:
    """What convolutions of the windows cost, and what those of masked samples do, in products."""
    beside = PIXELS_OF_WEIGHT_BACKWARD if backward else PIXELS_OF_WEIGHT
    own = dense = 0
    for group, run in _runs(planned):
        made = group.made.stop - group.made.start
        own += PRODUCTS_OF_CALL + geometry.taps * group.width * made * (geometry.outputs * (run.stop - run.start) + beside)
    for part in tiles(len(x), x[:1].numel()):
        samples = part.stop - part.start
        dense += PRODUCTS_OF_CALL + geometry.taps * x.shape[1] * outputs * (geometry.outputs * samples + beside)
    return own, dense


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, run: slice, geometry: Geometry) -> Tensor:
    beside = None if bias is None else bias[group.made]
    views = x[run, group.seen], weight[group.made, group.seen]
    return torch.mkldnn_convolution(*views, beside, geometry.padding, geometry.stride, geometry.dilation, 1)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, planned: Sequence[Group], geometry: Geometry) -> Tensor:
    """What the groups' samples see, [N, O, H', W'], and zeros outside the outputs of their windows."""
    shape, runs = (len(x), len(weight), *geometry.out), list(_runs(planned))
    if len(runs) == 1 and (runs[0][1], runs[0][0].made) == (slice(0, len(x)), slice(0, len(weight))):
        return in_rows(_convolution(x, weight, bias, *runs[0], geometry))
    whole = all(group.width and group.made == slice(0, len(weight)) for group in planned)
    y = x.new_empty(shape) if whole else x.new_zeros(shape)
    for group in planned:
        if not group.width and bias is not None:
            y[group.samples, group.made] = bias[group.made, None, None]
    for group, run in runs:
        y[run, group.made] = _convolution(x, weight, bias, group, run, geometry)
    return y


def convolve_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, planned: Sequence[Group], geometry: Geometry, needed: Sequence[bool]
) -> list[Tensor]:
    """The gradients of x and weight that are needed; the weight's is summed in float32, run after run."""
    for_x = torch.zeros(x.shape, dtype=x.dtype) if needed[0] else None
    sums = torch.zeros(weight.shape, dtype=accumulation_dtype(weight)) if needed[1] else None
    for group, run in _runs(planned):
        seen, part, _ = torch.ops.aten.convolution_backward(
            gradient[run, group.made], x[run, group.seen], weight[group.made, group.seen], None,
            geometry.stride, geometry.padding, geometry.dilation, False, [0, 0], 1, [needed[0], needed[1], False],
        )  # fmt: skip
        if for_x is not None:
            for_x[run, group.seen] = seen
        if sums is not None:
            sums[group.made, group.seen] += part
    found = [] if for_x is None else [for_x]
    return found if sums is None else [*found, sums.to(weight.dtype)]

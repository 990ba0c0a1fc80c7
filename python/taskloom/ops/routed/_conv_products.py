"""window_conv2d on the CPU: the columns of one sample's window at a time, times a view of the weight; or what is faster than that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from taskloom.ops.routed import _conv_loops, _conv_onednn
from taskloom.ops.routed._linear_products import for_bias, shifted, summed_parts, within
from taskloom.ops.routed._products import add_product, in_rows, masked_parts, product, product_dtype, zeroed_outside
from taskloom.ops.routed._windows import Group, Keys, grouped, window_keys
from taskloom.reference.arithmetic import accumulation_dtype

# Entries of the columns that are made at a time.
COLUMNS = 1 << 20
# From this share of the channels on, torch's own convolution of a masked input is faster than products: what
# benchmarks/bench_window_crossover.py showed.
DENSE_FROM = 0.75

Way: TypeAlias = Literal["dense", "onednn", "loops", "products"]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of a convolution."""

    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def out(self) -> tuple[int, int]:
        """Rows and columns of the output."""
        down, across = (out_size(*sizes) for sizes in zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True))
        return down, across

    @property
    def outputs(self) -> int:
        """Positions of the output."""
        return self.out[0] * self.out[1]

    @property
    def taps(self) -> int:
        """Entries of the kernel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def is_pointwise(self) -> bool:
        """Whether the columns are the input itself."""
        return self.kernel == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0)

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns of a padded input."""
        return self.size[0] + 2 * self.padding[0], self.size[1] + 2 * self.padding[1]


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Outputs along one dimension."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def geometry_of(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Geometry:
    """The sizes from an op's arguments."""
    pairs = ((one[0], one[1]) for one in (x.shape[2:], weight.shape[2:], stride, padding, dilation))
    return Geometry(*pairs)


def share_seen(planned: Sequence[Group], x: Tensor) -> float:
    """The share of all samples' channels that is in their windows."""
    return sum(group.width * len(group.samples) for group in planned) / max(x.shape[0] * x.shape[1], 1)


def dense_from(by_loops: bool) -> float:
    """The share of the channels from which on torch's convolution of a masked input is faster than loops, or products."""
    return _conv_loops.DENSE_FROM if by_loops else DENSE_FROM


def choose_way(
    planned: Sequence[Group], x: Tensor, outputs: int, out_start: Tensor | None, geometry: Geometry, backward: bool = False
) -> Way:
    """What is fastest: torch's convolution of masked samples (never for some outputs only), oneDNN's of windows, loops or products."""
    if _conv_onednn.is_faster(planned, x, geometry):
        own, dense = _conv_onednn.window_costs(planned, x, outputs, geometry, backward)
        return "dense" if out_start is None and own > dense else "onednn"
    by_loops = not backward and _conv_loops.are_faster(x, outputs, geometry)
    could_be_dense = x.dtype == torch.float32 and out_start is None and not geometry.is_pointwise
    if could_be_dense and share_seen(planned, x) >= dense_from(by_loops):
        return "dense"
    return "loops" if by_loops else "products"


class _Columns:
    """The inputs of each output of a window, [w kh kw, outputs], for some rows of outputs at a time; memory is used again."""

    def __init__(self, geometry: Geometry, width: int, dtype: torch.dtype) -> None:
        self.geometry, self.dtype = geometry, dtype
        self._rows = max(COLUMNS // max(width * geometry.taps * geometry.out[1], 1), 1)
        self._columns = self._padded = torch.empty(0)
        if not geometry.is_pointwise:
            self._columns = torch.empty(width * geometry.taps * min(self._rows, geometry.out[0]) * geometry.out[1], dtype=dtype)
            self._padded = torch.zeros((width, *geometry.padded), dtype=dtype)

    def parts(self, values: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The columns of values [w, H, W], and which outputs they belong to."""
        down, across = self.geometry.out
        if self.geometry.is_pointwise:
            yield slice(0, down * across), values.reshape(len(values), down * across)
            return
        padded = self._fill(values)
        for begin in range(0, down, self._rows):
            end = min(begin + self._rows, down)
            yield slice(begin * across, end * across), self._spread(padded, begin, end)

    def _fill(self, values: Tensor) -> Tensor:
        top, left = self.geometry.padding
        padded = self._padded[: len(values)]
        padded[:, top : top + values.shape[1], left : left + values.shape[2]] = values
        return padded

    def _shape(self, width: int, begin: int, end: int) -> tuple[int, ...]:
        return (width, *self.geometry.kernel, end - begin, self.geometry.out[1])

    def _spread(self, padded: Tensor, begin: int, end: int) -> Tensor:
        (down, across), (dilated_down, dilated_across) = self.geometry.stride, self.geometry.dilation
        channel, row, column = padded.stride()
        shape = self._shape(len(padded), begin, end)
        strides = (channel, dilated_down * row, dilated_across * column, down * row, across * column)
        columns = self._columns[: torch.Size(shape).numel()].view(shape)
        columns.copy_(padded.as_strided(shape, strides, padded.storage_offset() + begin * down * row))
        return columns.view(shape[0] * self.geometry.taps, shape[3] * shape[4])

    def gathered(self, left: Tensor, back: Tensor, into: Tensor) -> None:
        """Write to ``into`` [w, H, W] the sum of ``left back`` [w kh kw, outputs] at the input that each belongs to."""
        width = len(into)
        if self.geometry.is_pointwise:
            product(left, back, into.view(width, back.shape[1]))
            return
        padded = self._padded[:width].zero_()
        down, across = self.geometry.out
        for begin in range(0, down, self._rows):
            end = min(begin + self._rows, down)
            shape = self._shape(width, begin, end)
            columns = self._columns[: torch.Size(shape).numel()]
            product(left, back[:, begin * across : end * across], columns.view(width * self.geometry.taps, shape[3] * shape[4]))
            self._add_taps(columns.view(shape), padded, begin)
        top, before = self.geometry.padding
        into.copy_(padded[:, top : top + into.shape[1], before : before + into.shape[2]])

    def _add_taps(self, columns: Tensor, padded: Tensor, begin: int) -> None:
        (down, across), (dilated_down, dilated_across) = self.geometry.stride, self.geometry.dilation
        rows, wide = columns.shape[3:]
        for i in range(self.geometry.kernel[0]):
            first = i * dilated_down + begin * down
            for j in range(self.geometry.kernel[1]):
                before = j * dilated_across
                target = padded[:, first : first + (rows - 1) * down + 1 : down, before : before + (wide - 1) * across + 1 : across]
                target += columns[:, i, j]


def _widest(planned: Sequence[Group]) -> int:
    return max((group.width for group in planned), default=0)


def _view(weight: Tensor, group: Group, made: slice, taps: int) -> Tensor:
    """The window's part of the weight as a matrix [made, w kh kw]."""
    return weight.reshape(len(weight), weight.shape[1] * taps)[made, group.seen.start * taps : group.seen.stop * taps]


def window_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: Tensor,
    width: int,
    widths: Tensor | None,
    out_start: Tensor | None,
    out_width: int,
    out_widths: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """By the fastest way; torch's own convolution sees samples that are masked a tile at a time."""
    geometry = geometry_of(x, weight, stride, padding, dilation)
    window, out_window = (start, width, widths), (out_start, out_width, out_widths)
    keys = window_keys("window_conv2d", len(x), x.shape[1], window, len(weight), out_window)
    planned = grouped(keys, len(weight))
    way = choose_way(planned, x, len(weight), out_start, geometry)
    if way == "dense":
        return _dense(x, weight, bias, keys, geometry)
    if way == "onednn":
        return _conv_onednn.convolve(x, weight, bias, planned, geometry)
    shape = (len(x), len(weight), *geometry.out)
    y = x.new_empty(shape) if out_start is None else x.new_zeros(shape)
    if way == "loops":
        _conv_loops.convolve(x, weight, bias, planned, geometry, y)
        return y
    columns = _Columns(geometry, _widest(planned), product_dtype(x.dtype))
    flat = y.view(len(x), len(weight), geometry.outputs)
    for group in planned:
        left = _view(weight, group, group.made, geometry.taps)
        beside = None if bias is None else bias[group.made, None]
        for sample in group.samples:
            for part, right in columns.parts(x[sample, group.seen]):
                product(left, right, flat[sample, group.made, part], beside)
    return y


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None, keys: Keys, geometry: Geometry) -> Tensor:
    y: Tensor | None = None
    for part, masked in masked_parts(x[:, None], keys):
        found = torch.nn.functional.conv2d(masked[:, 0], weight, bias, geometry.stride, geometry.padding, geometry.dilation)
        if len(found) == len(x):
            return in_rows(found)
        y = x.new_empty((len(x), *found.shape[1:])) if y is None else y
        y[part] = found
    return x.new_empty((len(x), len(weight), *geometry.out)) if y is None else y


def window_conv2d_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    start: Tensor,
    width: int,
    widths: Tensor | None,
    out_start: Tensor | None,
    out_width: int,
    out_widths: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    needed: Sequence[bool],
) -> list[Tensor]:
    """The gradients; a weight's is summed window after window, in their order."""
    geometry = geometry_of(x, weight, stride, padding, dilation)
    window, out_window = (start, width, widths), (out_start, out_width, out_widths)
    keys = window_keys("window_conv2d", len(x), x.shape[1], window, len(weight), out_window)
    planned = grouped(keys, len(weight))
    way = choose_way(planned, x, len(weight), out_start, geometry, backward=True)
    bias = [for_bias(gradient, 1, planned if out_start is not None else None, weight.dtype)] if needed[2] else []
    if way == "dense":
        return _dense_backward(gradient, x, weight, keys, geometry, needed) + bias
    if way == "onednn":
        return _conv_onednn.convolve_backward(gradient, x, weight, planned, geometry, needed) + bias
    found: list[Tensor] = []
    back = gradient.reshape(len(x), len(weight), geometry.outputs)
    if needed[0]:
        found.append(_for_x(back, x, weight, planned, geometry))
    if needed[1]:
        found.append(_for_weight(back, x, weight, planned, geometry))
    return found + bias


def _for_x(back: Tensor, x: Tensor, weight: Tensor, planned: Sequence[Group], geometry: Geometry) -> Tensor:
    made = torch.zeros(x.shape, dtype=x.dtype)
    gradient = back.view(len(x), len(weight), *geometry.out)
    if _conv_loops.are_faster_backward(gradient, planned, geometry):
        _conv_loops.convolve_backward(gradient, weight, planned, geometry, made)
        return made
    columns = _Columns(geometry, _widest(planned), accumulation_dtype(x))
    for group in planned:
        left = _view(weight, group, group.made, geometry.taps).T
        for sample in group.samples:
            columns.gathered(left, back[sample, group.made], made[sample, group.seen])
    return made


def _for_weight(back: Tensor, x: Tensor, weight: Tensor, planned: Sequence[Group], geometry: Geometry) -> Tensor:
    columns = _Columns(geometry, _widest(planned), accumulation_dtype(x))
    whole = torch.zeros(weight.shape, dtype=weight.dtype)
    for part, sums in summed_parts(whole):
        for group in planned:
            made = within(group.made, part)
            target = _view(sums, group, shifted(made, part.start), geometry.taps)
            for sample in group.samples:
                for outputs, right in columns.parts(x[sample, group.seen]):
                    add_product(back[sample, made, outputs], right.T, target)
    return whole


def _dense_backward(gradient: Tensor, x: Tensor, weight: Tensor, keys: Keys, geometry: Geometry, needed: Sequence[bool]) -> list[Tensor]:
    made = torch.empty(x.shape, dtype=x.dtype) if needed[0] else None
    sums: Tensor | None = None
    for part, masked in masked_parts(x[:, None], keys):
        for_x, for_weight, _ = torch.ops.aten.convolution_backward(
            gradient[part], masked[:, 0], weight, None, geometry.stride, geometry.padding, geometry.dilation, False, [0, 0], 1,
            [needed[0], needed[1], False],
        )  # fmt: skip
        if made is not None:
            made[part] = for_x
        if needed[1]:
            sums = for_weight if sums is None else sums.to(accumulation_dtype(weight)).add_(for_weight)
    found = [] if made is None else [zeroed_outside(made[:, None], keys)[:, 0]]
    if not needed[1]:
        return found
    return [*found, torch.zeros(weight.shape, dtype=weight.dtype) if sums is None else in_rows(sums.to(weight.dtype))]

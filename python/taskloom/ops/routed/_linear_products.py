"""window_linear on the CPU: torch's matrix products on views of x and weight, one for each window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from taskloom.ops.routed._products import SIXTEEN_BITS, add_product, masked_parts, product, tiles, zeroed_outside
from taskloom.ops.routed._windows import Group, Keys, grouped, window_keys
from taskloom.reference.arithmetic import accumulation_dtype

# Samples of fewer rows than this are gathered into one product where they share a window.
GATHERED_BELOW = 32


def _is_gathered(group: Group, positions: int) -> bool:
    return positions < GATHERED_BELOW and len(group.runs()) > 1


def window_costs(keys: Keys, positions: int, channels: int) -> tuple[int, int]:
    """What the products of the windows cost, and what one dense product on masked rows does, in the same unit.

    A group is one product; or it is several of so many rows that each row counts as one.
    """
    own, dense = torch.ops.taskloom_loops.window_linear_costs.default(torch.from_numpy(keys), positions, channels)
    return own, dense


def is_dense(keys: Keys, x: Tensor, out_start: Tensor | None) -> bool:
    """Whether one product on masked rows is the faster one; never where only some outputs are wanted."""
    if out_start is not None or not len(keys):
        return False
    own, dense = window_costs(keys, x.shape[1], x.shape[2])
    return own > dense


def _rows_of(group: Group, positions: int, columns: int) -> Iterator[slice | Tensor]:
    """The rows of a group among all samples' rows: slices, or indices of at most a tile of entries."""
    if not _is_gathered(group, positions):
        for begin, end in group.runs():
            yield slice(begin * positions, end * positions)
        return
    rows = torch.tensor(group.samples)[:, None] * positions + torch.arange(positions)
    flat = rows.flatten()
    for part in tiles(len(flat), columns):
        yield flat[part]


def _taken(matrix: Tensor, rows: slice | Tensor, columns: slice) -> Tensor:
    """A view for a slice of rows, a copy of a window's columns for indices."""
    return matrix[rows, columns] if isinstance(rows, slice) else matrix[:, columns].index_select(0, rows)


def _write_product(left: Tensor, right: Tensor, matrix: Tensor, rows: slice | Tensor, columns: slice, start: Tensor | None) -> None:
    if isinstance(rows, slice):
        product(left, right, matrix[rows, columns], start)
        return
    made = matrix.new_empty((len(rows), columns.stop - columns.start))
    product(left, right, made, start)
    matrix[:, columns].index_copy_(0, rows, made)


def window_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: Tensor,
    width: int,
    widths: Tensor | None,
    out_start: Tensor | None,
    out_width: int,
    out_widths: Tensor | None,
) -> Tensor:
    """Each window's rows times a view of the weight; or all rows, masked a tile at a time, where that is faster.

    csrc/routed/window_linear_ops.cpp calls this, but for masked rows of one tile.
    """
    samples, positions, channels = x.shape
    outputs = len(weight)
    keys = window_keys("window_linear", samples, channels, (start, width, widths), outputs, (out_start, out_width, out_widths))
    y = x.new_empty((samples, positions, outputs)) if out_start is None else x.new_zeros((samples, positions, outputs))
    rows_out = y.view(samples * positions, outputs)
    if is_dense(keys, x, out_start):
        for part, masked in masked_parts(x, keys):
            product(masked.flatten(0, 1), weight.T, y[part].flatten(0, 1), bias)
        return y
    flat = x.reshape(samples * positions, channels)
    for group in grouped(keys, outputs):
        right, beside = weight[group.made, group.seen].T, None if bias is None else bias[group.made]
        for rows in _rows_of(group, positions, max(group.width, outputs)):
            _write_product(_taken(flat, rows, group.seen), right, rows_out, rows, group.made, beside)
    return y


def window_linear_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    start: Tensor,
    width: int,
    widths: Tensor | None,
    out_start: Tensor | None,
    out_width: int,
    out_widths: Tensor | None,
    needed: Sequence[bool],
) -> list[Tensor]:
    """The gradients by products on the same views; a weight's is summed window after window, in their order."""
    window, out_window = (start, width, widths), (out_start, out_width, out_widths)
    keys = window_keys("window_linear", len(x), x.shape[2], window, len(weight), out_window)
    dense = is_dense(keys, x, out_start)
    planned = [] if dense else grouped(keys, len(weight))
    found: list[Tensor] = []
    if needed[0]:
        found.append(_dense_for_x(gradient, x, weight, keys) if dense else _for_x(gradient, x, weight, planned))
    if needed[1]:
        found.append(_dense_for_weight(gradient, x, weight, keys) if dense else _for_weight(gradient, x, weight, planned))
    if needed[2]:
        found.append(for_bias(gradient, 2, planned if out_start is not None else None, weight.dtype))
    return found


def _dense_for_x(gradient: Tensor, x: Tensor, weight: Tensor, keys: Keys) -> Tensor:
    made = torch.empty(x.shape, dtype=x.dtype)
    for part in tiles(len(x), x.shape[1] * x.shape[2]):
        product(gradient[part].flatten(0, 1), weight, made[part].flatten(0, 1))
        zeroed_outside(made[part], keys[part])
    return made


def _for_x(gradient: Tensor, x: Tensor, weight: Tensor, planned: Sequence[Group]) -> Tensor:
    samples, positions, channels = x.shape
    made = torch.zeros(x.shape, dtype=x.dtype)
    back, rows_out = gradient.reshape(samples * positions, len(weight)), made.view(samples * positions, channels)
    for group in planned:
        for rows in _rows_of(group, positions, max(channels, len(weight))):
            _write_product(_taken(back, rows, group.made), weight[group.made, group.seen], rows_out, rows, group.seen, None)
    return made


def summed_parts(whole: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a weight's gradient, and zeros to sum up in: the gradient itself, or float32 that is rounded into it afterwards."""
    if whole.dtype not in SIXTEEN_BITS:
        yield slice(0, len(whole)), whole
        return
    for part in tiles(len(whole), whole[:1].numel()):
        sums = torch.zeros(whole[part].shape, dtype=accumulation_dtype(whole))
        yield part, sums
        whole[part] = sums


def within(rows: slice, part: slice) -> slice:
    """The rows that are in a part too."""
    begin = max(rows.start, part.start)
    return slice(begin, max(begin, min(rows.stop, part.stop)))


def shifted(rows: slice, by: int) -> slice:
    """The same rows counted from ``by`` on."""
    return slice(rows.start - by, rows.stop - by)


def _for_weight(gradient: Tensor, x: Tensor, weight: Tensor, planned: Sequence[Group]) -> Tensor:
    samples, positions, channels = x.shape
    back, flat = gradient.reshape(samples * positions, len(weight)), x.reshape(samples * positions, channels)
    whole = torch.zeros(weight.shape, dtype=weight.dtype)
    for part, sums in summed_parts(whole):
        for group in planned:
            made = within(group.made, part)
            target = sums[shifted(made, part.start), group.seen]
            for rows in _rows_of(group, positions, max(channels, len(weight))):
                add_product(_taken(back, rows, made).T, _taken(flat, rows, group.seen), target)
    return whole


def _dense_for_weight(gradient: Tensor, x: Tensor, weight: Tensor, keys: Keys) -> Tensor:
    whole = torch.zeros(weight.shape, dtype=weight.dtype)
    for part, sums in summed_parts(whole):
        for chosen, masked in masked_parts(x, keys):
            add_product(gradient[chosen][..., part].flatten(0, 1).T, masked.flatten(0, 1), sums)
    return whole


def for_bias(gradient: Tensor, channel_dim: int, planned: Sequence[Group] | None, dtype: torch.dtype) -> Tensor:
    """The gradient summed over everything but its channels; with ``planned``, of the outputs that were made."""
    others = [dim for dim in range(1, gradient.dim()) if dim != channel_dim]
    wide = accumulation_dtype(gradient)
    each = torch.empty((len(gradient), gradient.shape[channel_dim]), dtype=wide)
    for part in tiles(len(gradient), gradient[:1].numel()):
        each[part] = gradient[part].to(wide).sum(others)
    if planned is None:
        return each.sum(0).to(dtype)
    total = torch.zeros(each.shape[1], dtype=wide)
    for group in planned:
        total[group.made] += each[group.samples][:, group.made].sum(0)
    return total.to(dtype)

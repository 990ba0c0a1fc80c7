"""lowrank_apply: rows grouped by task in tiles, the inner values of a tile on chip."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.ops.lowrank import _products
from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.triton_kernels.launch import INTERPRETED, launch, raw
from taskloom.triton_kernels.masked.entries import load_entries, store_entries

# Ranks that a tile's inner values take at once; more go in several passes.
MOST_RANKS = 64
_ROWS = 16
# Programs that keep a large GPU busy.
_PROGRAMS = 512


@triton.jit
def lowrank_apply_kernel(
    x,
    A,
    B,
    weight,
    order,
    bounds,
    start,
    out,
    columns,
    rows_out,
    first_rank,
    rank,
    share,
    STARTS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
):
    """Some outputs (``share`` of them) of a tile of rows that have one task: start + weight * (x A^T) B^T for ranks first_rank and on."""
    tile = tl.program_id(0)
    task = tl.load(bounds + 3 * tile)
    place = tl.load(bounds + 3 * tile + 1) + tl.arange(0, ROWS)
    present = place < tl.load(bounds + 3 * tile + 2)
    row = tl.load(order + place, mask=present, other=0)
    ranks = first_rank + tl.arange(0, RANKS)
    in_ranks = ranks < rank
    adapter = tl.maximum(task, 0)
    inner = tl.zeros((ROWS, RANKS), dtype=tl.float64 if WIDE else tl.float32)
    first = 0
    while first < columns:
        column = first + tl.arange(0, INNER)
        in_columns = column < columns
        values = load_entries(x, row[:, None] * columns + column[None, :], present[:, None] & in_columns[None, :], WIDE)
        factors = load_entries(
            A, (adapter * rank + ranks)[None, :] * columns + column[:, None], in_columns[:, None] & in_ranks[None, :], WIDE
        )
        inner += tl.dot(values, factors, input_precision="ieee", out_dtype=inner.dtype)
        first += INNER
    inner *= tl.where(task < 0, 0.0, tl.load(weight + adapter))
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, rows_out)
    while first < last:
        output = first + tl.arange(0, OUTER)
        inside = present[:, None] & (output < last)[None, :]
        factors = load_entries(
            B, (adapter * rows_out + output)[None, :] * rank + ranks[:, None], in_ranks[:, None] & (output < last)[None, :], WIDE
        )
        added = tl.dot(inner, factors, input_precision="ieee", out_dtype=inner.dtype)
        added = tl.where(task < 0, 0.0, added)
        places = row[:, None] * rows_out + output[None, :]
        if STARTS:
            added = load_entries(start, places, inside, WIDE) + added
        store_entries(out, places, added, inside)
        first += OUTER


def _tiles(task: Tensor, tasks: int) -> tuple[Tensor, Tensor]:
    """Rows in the order of their tasks, and for each tile its task, first and last place (exclusive); without waiting for the device.

    There are as many tiles as any distribution of tasks may take; those left over have no rows.
    """
    ids = task.long().clamp(min=-1)
    torch._assert_async((ids < tasks).all(), f"lowrank_apply: task: expected values below {tasks}, the number of adapters")
    order = torch.argsort(ids, stable=True)
    groups = torch.arange(-1, tasks, device=task.device)
    edges = torch.searchsorted(ids[order], torch.arange(-1, tasks + 1, device=task.device))
    begin, end = edges[:-1], edges[1:]
    ends = torch.cumsum((end - begin + _ROWS - 1) // _ROWS, 0)
    tile = torch.arange(triton.cdiv(len(task), _ROWS) + tasks + 1, device=task.device)
    group = torch.searchsorted(ends, tile, right=True).clamp(max=tasks)
    in_group = tile - torch.where(group > 0, ends[group - 1], 0)
    bounds = torch.stack([groups[group], begin[group] + in_group * _ROWS, end[group]], 1)
    return order, bounds.contiguous()


def _apply(x: Tensor, A: Tensor, B: Tensor, weight: Tensor, task: Tensor, start: Tensor | None) -> Tensor:
    dtype = accumulation_dtype(x, A, B, weight, start)
    tasks, rank, columns = A.shape
    rows_out = B.shape[1]
    order, bounds = _tiles(task, tasks)
    ranks = min(MOST_RANKS, max(16, triton.next_power_of_2(rank)))
    outer = 64 if not INTERPRETED else min(512, max(16, triton.next_power_of_2(rows_out)))
    parts = max(1, min(triton.cdiv(rows_out, outer), _PROGRAMS // len(bounds)))
    share = triton.cdiv(triton.cdiv(rows_out, outer), parts) * outer
    constants = {"WIDE": dtype == torch.float64, "ROWS": _ROWS, "RANKS": ranks, "INNER": 32 if not INTERPRETED else 128, "OUTER": outer}
    given = [raw(one.contiguous()) for one in (x, A, B)] + [weight.to(dtype).contiguous()]
    y = start
    for first in range(0, max(rank, 1), ranks):
        # What later passes add to is not rounded before the last of them.
        last = first + ranks >= rank
        out = torch.empty((len(x), rows_out), dtype=x.dtype if last else dtype, device=x.device)
        beside = raw((out if y is None else y).contiguous())
        sizes = (columns, rows_out, first, rank, share)
        grid = (len(bounds), triton.cdiv(rows_out, share))
        launch(lowrank_apply_kernel, grid, *given, order, bounds, beside, raw(out), *sizes, STARTS=y is not None, **constants)
        y = out
    assert y is not None
    return y


def lowrank_apply(x: Tensor, A: Tensor, B: Tensor, weight: Tensor, task: Tensor | None, start: Tensor | None) -> Tensor:
    """Launch :func:`taskloom.lowrank_apply`; a sum of adapters is two plain products, which torch's own library does best."""
    if task is None or min(len(x), len(A), B.shape[1]) == 0:
        return _products.lowrank_apply(x, A, B, weight, task, start)
    return _apply(x, A, B, weight, task, start)


def lowrank_apply_backward(
    gradient: Tensor, x: Tensor, A: Tensor, B: Tensor, weight: Tensor, task: Tensor | None, needed: Sequence[bool]
) -> list[Tensor]:
    """The gradients through torch's own matrix products, one group of rows after the other."""
    return _products.lowrank_apply_backward(gradient, x, A, B, weight, task, needed)

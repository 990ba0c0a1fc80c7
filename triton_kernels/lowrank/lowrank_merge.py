"""lowrank_merge, lowrank_merge_, lowrank_merge_tasks and lowrank_norm: tiles of base + product, made in registers."""

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


@triton.jit
def product_tile(left, right, row, column, rows, columns, rank, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of left^T right, [rank, rows] and [rank, columns], summed in the order of the ranks by fused multiply-adds, as on a CPU."""
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float64 if WIDE else tl.float32)
    in_rows, in_columns = row < rows, column < columns
    k = 0
    while k < rank:
        factor = tl.load(left + k.to(tl.int64) * rows + row, mask=in_rows, other=0)
        values = tl.load(right + k.to(tl.int64) * columns + column, mask=in_columns, other=0)
        total = tl.fma(tl.broadcast_to(factor[:, None], total.shape), tl.broadcast_to(values[None, :], total.shape), total)
        k += 1
    return total


@triton.jit
def lowrank_merge_kernel(
    base,
    left,
    right,
    row_scale,
    out,
    rows,
    columns,
    rank,
    tasks,
    base_stride,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """row_scale * (base + left^T right) for each task; the tile of base is read once for all of them."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    start = load_entries(base, row[:, None] * base_stride + column[None, :], inside, WIDE)
    offsets = row[:, None] * columns + column[None, :]
    wide_rows = rows.to(tl.int64)
    task = 0
    while task < tasks:
        own = task.to(tl.int64)
        own_left, own_right = left + own * rank * rows, right + own * rank * columns
        merged = start + product_tile(own_left, own_right, row, column, rows, columns, rank, WIDE, ROWS, COLUMNS)
        if SCALED:
            merged = tl.load(row_scale + row, mask=row < rows, other=0)[:, None] * merged
        store_entries(out, own * wide_rows * columns + offsets, merged, inside)
        task += 1


@triton.jit
def lowrank_norm_kernel(
    base, left, right, out, rows, columns, rank, base_stride, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The 2-norm of the rows of base + left^T right; squares are summed in float64."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    squares = tl.zeros((ROWS, COLUMNS), dtype=tl.float64)
    first = 0
    while first < columns:
        column = first + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        start = load_entries(base, row[:, None] * base_stride + column[None, :], inside, WIDE)
        merged = start + product_tile(left, right, row, column, rows, columns, rank, WIDE, ROWS, COLUMNS)
        wide = tl.where(inside, merged, 0.0).to(tl.float64)
        squares += wide * wide
        first += COLUMNS
    store_entries(out, row, tl.sqrt(tl.sum(squares, axis=1)), row < rows)


def _tile(rows: int, columns: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and columns of a program."""
    if not INTERPRETED:
        return 32, 64 if dtype == torch.float64 else 128
    # A program takes milliseconds whatever its size.
    return min(64, triton.next_power_of_2(max(rows, 1))), min(1024, triton.next_power_of_2(max(columns, 1)))


def _stacked(
    A: Sequence[Tensor], B: Sequence[Tensor], weight: Tensor, rows: int, columns: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The factors of a sum of products as those of one: [R, rows], weights multiplied in, and [R, columns]."""
    left = [share * b.to(dtype).T for share, b in zip(weight.to(dtype), B, strict=True)]
    none = (weight.new_zeros((0, size), dtype=dtype) for size in (rows, columns))
    first, second = none
    return torch.cat([first, *left]).contiguous(), torch.cat([second, *(a.to(dtype) for a in A)]).contiguous()


def _in_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[1] <= 1 or matrix.stride(1) == 1 else matrix.contiguous()


def _merge(base: Tensor, left: Tensor, right: Tensor, row_scale: Tensor | None, tasks: int, out: Tensor, dtype: torch.dtype) -> None:
    """Write the merges of all tasks to ``out``, contiguous; base may be it where there is one task."""
    rows, columns = base.shape
    height, width = _tile(rows, columns, dtype)
    grid = (triton.cdiv(rows, height), triton.cdiv(columns, width))
    scale = left if row_scale is None else row_scale.to(dtype).contiguous()
    sizes = (rows, columns, left.numel() // max(rows * tasks, 1), tasks, base.stride(0))
    constants = {"SCALED": row_scale is not None, "WIDE": dtype == torch.float64, "ROWS": height, "COLUMNS": width}
    launch(lowrank_merge_kernel, grid, raw(base), left, right, scale, raw(out), *sizes, **constants)


def lowrank_merge(base: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], weight: Tensor, row_scale: Tensor | None) -> Tensor:
    """Launch :func:`taskloom.lowrank_merge`."""
    dtype = accumulation_dtype(base, weight, row_scale, *A, *B)
    out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    left, right = _stacked(A, B, weight, *base.shape, dtype)
    _merge(_in_rows(base), left, right, row_scale, 1, out, dtype)
    return out


def lowrank_merge_(
    target: Tensor, base: Tensor | None, A: Sequence[Tensor], B: Sequence[Tensor], weight: Tensor, row_scale: Tensor | None
) -> None:
    """Launch :func:`taskloom.lowrank_merge_`."""
    start = target if base is None else base
    dtype = accumulation_dtype(start, weight, row_scale, *A, *B)
    # A tile reads and writes the same entries; a base that is elsewhere must not be written to before it is read.
    direct = target.is_contiguous() and (base is None or base.untyped_storage().data_ptr() != target.untyped_storage().data_ptr())
    out = target if direct else torch.empty(target.shape, dtype=target.dtype, device=target.device)
    left, right = _stacked(A, B, weight, *target.shape, dtype)
    _merge(_in_rows(start), left, right, row_scale, 1, out, dtype)
    if not direct:
        target.copy_(out)


def lowrank_merge_tasks(base: Tensor, A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    """Launch :func:`taskloom.lowrank_merge_tasks`."""
    dtype = accumulation_dtype(base, A, B, weight)
    out = torch.empty((len(A), *base.shape), dtype=base.dtype, device=base.device)
    left = (weight.to(dtype)[:, None, None] * B.to(dtype).mT).contiguous()
    _merge(_in_rows(base), left, A.to(dtype).contiguous(), None, len(A), out, dtype)
    return out


def lowrank_norm(base: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Launch :func:`taskloom.lowrank_norm`."""
    dtype = accumulation_dtype(base, weight, *A, *B)
    rows, columns = base.shape
    out = torch.empty(rows, dtype=dtype, device=base.device)
    left, right = _stacked(A, B, weight, rows, columns, dtype)
    start = _in_rows(base)
    height, width = (16, 64) if not INTERPRETED else _tile(rows, columns, dtype)
    constants = {"WIDE": dtype == torch.float64, "ROWS": height, "COLUMNS": width}
    sizes = (rows, columns, len(left), start.stride(0))
    launch(lowrank_norm_kernel, (triton.cdiv(rows, height),), raw(start), left, right, out, *sizes, **constants)
    return out


def lowrank_merge_backward(
    gradient: Tensor,
    base: Tensor | None,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    weight: Tensor,
    row_scale: Tensor | None,
    needed: Sequence[bool],
) -> list[Tensor]:
    """The gradients through torch's own matrix products, which a GPU's library does best."""
    return _products.lowrank_merge_backward(gradient, base, A, B, weight, row_scale, needed)

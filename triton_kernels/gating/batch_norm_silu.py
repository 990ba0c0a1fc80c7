"""batch_norm_silu and its backward: a program takes a part of the rows of a block of columns, and joins what all parts found in order."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.triton_kernels.launch import INTERPRETED, launch, raw
from taskloom.triton_kernels.masked.entries import divided, load_entries, store_entries
from taskloom.triton_kernels.routed.window_rows import square_root

# Rows of a part, while a batch has few parts: each program that joins them reads all.
_PART_ROWS, _MOST_PARTS = 256, 32


@triton.jit
def _columns(experts, features, expert_stride, COLUMNS: tl.constexpr):
    """The program's columns of all experts' as one list, their places in a row, and which there are."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    expert = column // features
    return column, expert.to(tl.int64) * expert_stride + (column - expert * features), column < experts * features


@triton.jit
def _affine(weight, bias, column, present, WEIGHT: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr):
    """The factors and addends of columns."""
    factors = tl.where(present, 1.0, 1.0).to(tl.float64 if WIDE else tl.float32)
    addends = tl.where(present, 0.0, 0.0).to(tl.float64 if WIDE else tl.float32)
    if WEIGHT:
        factors = load_entries(weight, column, present, WIDE)
    if BIAS:
        addends = load_entries(bias, column, present, WIDE)
    return factors, addends


@triton.jit
def _activated(inner, ACTIVATION: tl.constexpr, WIDE: tl.constexpr):
    """The activation's value."""
    if ACTIVATION == "relu":
        result = tl.where(inner < 0, 0.0, inner)
    elif ACTIVATION == "silu":
        result = divided(inner, 1 + tl.exp(-inner), WIDE)
    else:
        result = inner
    return result


@triton.jit
def _slope(inner, ACTIVATION: tl.constexpr, WIDE: tl.constexpr):
    """The activation's derivative."""
    if ACTIVATION == "relu":
        result = tl.where(inner > 0, 1.0, 0.0).to(inner.dtype)
    elif ACTIVATION == "silu":
        gate = divided(tl.zeros_like(inner) + 1, 1 + tl.exp(-inner), WIDE)
        result = gate * (1 + inner * (1 - gate))
    else:
        result = tl.zeros_like(inner) + 1
    return result


@triton.jit
def _joined(mean, squares, count, other_mean, other_squares, more, WIDE: tl.constexpr):
    """Moments of ``count`` values with those of ``more``, as Chan, Golub and LeVeque put it."""
    zero = tl.zeros_like(mean)
    share = divided(zero + more, zero + (count + more), WIDE)
    apart = other_mean - mean
    return mean + apart * share, squares + (other_squares + apart * apart * (share * count))


@triton.jit
def batch_moments_kernel(
    z,
    means,
    squares,
    rows,
    experts,
    features,
    row_stride,
    expert_stride,
    part_rows,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The mean of a part of the rows, and the sum of squares about it."""
    column, place, present = _columns(experts, features, expert_stride, COLUMNS)
    part = tl.program_id(1).to(tl.int64)
    mean = tl.zeros([COLUMNS], tl.float64 if WIDE else tl.float32)
    apart = tl.zeros_like(mean)
    first = part * part_rows
    last = tl.minimum(first + part_rows, rows)
    while first < last:
        row = first + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & present[None, :]
        values = load_entries(z, row[:, None] * row_stride + place[None, :], inside, WIDE)
        more = tl.minimum(last - first, ROWS)
        middle = divided(tl.sum(values, axis=0), tl.zeros_like(mean) + more, WIDE)
        distance = tl.where(inside, values - middle[None, :], 0.0)
        before = first - part * part_rows
        mean, apart = _joined(mean, apart, before, middle, tl.sum(distance * distance, axis=0), more, WIDE)
        first += ROWS
    tl.store(means + part * experts * features + column, mean, mask=present)
    tl.store(squares + part * experts * features + column, apart, mask=present)


@triton.jit
def batch_norm_silu_kernel(
    z,
    weight,
    bias,
    means,
    squares,
    y,
    mean_out,
    var_out,
    rows,
    experts,
    features,
    row_stride,
    expert_stride,
    part_rows,
    parts,
    EPS: tl.constexpr,
    RUNNING: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Results of a part of the rows, by running statistics or by the moments of all parts."""
    column, place, present = _columns(experts, features, expert_stride, COLUMNS)
    part = tl.program_id(1).to(tl.int64)
    columns = experts * features
    if RUNNING:
        mean = load_entries(means, column, present, WIDE)
        variance = load_entries(squares, column, present, WIDE)
    else:
        mean = tl.zeros([COLUMNS], tl.float64 if WIDE else tl.float32)
        apart = tl.zeros_like(mean)
        other = 0
        while other < parts:
            middle = tl.load(means + other * columns + column, mask=present, other=0)
            distance = tl.load(squares + other * columns + column, mask=present, other=0)
            more = tl.minimum(rows - other * part_rows, part_rows)
            mean, apart = _joined(mean, apart, other * part_rows, middle, distance, more, WIDE)
            other += 1
        variance = divided(apart, tl.zeros_like(apart) + rows, WIDE)
    if part == 0:
        tl.store(mean_out + column, mean, mask=present)
        tl.store(var_out + column, variance, mask=present)
    factor = divided(tl.zeros_like(variance) + 1, square_root(variance + EPS, WIDE), WIDE)
    factors, addends = _affine(weight, bias, column, present, WEIGHT, BIAS, WIDE)
    first = part * part_rows
    last = tl.minimum(first + part_rows, rows)
    while first < last:
        row = first + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & present[None, :]
        values = load_entries(z, row[:, None] * row_stride + place[None, :], inside, WIDE)
        inner = (values - mean[None, :]) * factor[None, :] * factors[None, :] + addends[None, :]
        store_entries(y, row[:, None] * columns + column[None, :], _activated(inner, ACTIVATION, WIDE), inside)
        first += ROWS


@triton.jit
def _normal_and_slope(
    z,
    gradient,
    row,
    inside,
    place,
    gradient_place,
    row_stride,
    gradient_stride,
    mean,
    factor,
    factors,
    addends,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The normalised values of some rows, and the gradients of the activation's arguments, 0 outside."""
    values = load_entries(z, row[:, None] * row_stride + place[None, :], inside, WIDE)
    slopes = load_entries(gradient, row[:, None] * gradient_stride + gradient_place[None, :], inside, WIDE)
    normal = (values - mean[None, :]) * factor[None, :]
    slopes = slopes * _slope(normal * factors[None, :] + addends[None, :], ACTIVATION, WIDE)
    return normal, tl.where(inside, slopes, 0.0)


@triton.jit
def batch_norm_sums_kernel(
    gradient,
    z,
    weight,
    bias,
    mean,
    var,
    plain,
    product,
    rows,
    experts,
    features,
    row_stride,
    expert_stride,
    gradient_stride,
    gradient_expert_stride,
    part_rows,
    EPS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums over a part of the rows: of the gradients of the activation's arguments, and of these times the normalised values."""
    column, place, present = _columns(experts, features, expert_stride, COLUMNS)
    gradient_place = _columns(experts, features, gradient_expert_stride, COLUMNS)[1]
    part = tl.program_id(1).to(tl.int64)
    middle = tl.load(mean + column, mask=present, other=0)
    variance = tl.load(var + column, mask=present, other=1)
    factor = divided(tl.zeros_like(variance) + 1, square_root(variance + EPS, WIDE), WIDE)
    factors, addends = _affine(weight, bias, column, present, WEIGHT, BIAS, WIDE)
    sums = tl.zeros([COLUMNS], tl.float64 if WIDE else tl.float32)
    products = tl.zeros_like(sums)
    first = part * part_rows
    last = tl.minimum(first + part_rows, rows)
    while first < last:
        row = first + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & present[None, :]
        normal, slopes = _normal_and_slope(
            z, gradient, row, inside, place, gradient_place, row_stride, gradient_stride, middle, factor, factors, addends, ACTIVATION, WIDE
        )
        sums += tl.sum(slopes, axis=0)
        products += tl.sum(slopes * normal, axis=0)
        first += ROWS
    tl.store(plain + part * experts * features + column, sums, mask=present)
    tl.store(product + part * experts * features + column, products, mask=present)


@triton.jit
def batch_norm_silu_backward_kernel(
    gradient,
    z,
    weight,
    bias,
    mean,
    var,
    plain,
    product,
    dz,
    dweight,
    dbias,
    rows,
    experts,
    features,
    row_stride,
    expert_stride,
    gradient_stride,
    gradient_expert_stride,
    part_rows,
    parts,
    EPS: tl.constexpr,
    RUNNING: tl.constexpr,
    FOR_Z: tl.constexpr,
    FOR_WEIGHT: tl.constexpr,
    FOR_BIAS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradient of z for a part of the rows, from the sums of all parts; the first part's programs also write weight's and bias's."""
    column, place, present = _columns(experts, features, expert_stride, COLUMNS)
    gradient_place = _columns(experts, features, gradient_expert_stride, COLUMNS)[1]
    columns = experts * features
    part = tl.program_id(1).to(tl.int64)
    middle = tl.load(mean + column, mask=present, other=0)
    variance = tl.load(var + column, mask=present, other=1)
    factor = divided(tl.zeros_like(variance) + 1, square_root(variance + EPS, WIDE), WIDE)
    factors, addends = _affine(weight, bias, column, present, WEIGHT, BIAS, WIDE)
    sums = tl.zeros([COLUMNS], tl.float64 if WIDE else tl.float32)
    products = tl.zeros_like(sums)
    other = 0
    while other < parts:
        sums += tl.load(plain + other * columns + column, mask=present, other=0)
        products += tl.load(product + other * columns + column, mask=present, other=0)
        other += 1
    if FOR_WEIGHT:
        store_entries(dweight, column, products, present & (part == 0))
    if FOR_BIAS:
        store_entries(dbias, column, sums, present & (part == 0))
    if FOR_Z:
        total = tl.zeros_like(sums) + rows
        sums = divided(sums, total, WIDE)
        products = divided(products, total, WIDE)
        first = part * part_rows
        last = tl.minimum(first + part_rows, rows)
        while first < last:
            row = first + tl.arange(0, ROWS)
            inside = (row < last)[:, None] & present[None, :]
            normal, slopes = _normal_and_slope(
                z,
                gradient,
                row,
                inside,
                place,
                gradient_place,
                row_stride,
                gradient_stride,
                middle,
                factor,
                factors,
                addends,
                ACTIVATION,
                WIDE,
            )
            # Without the batch's statistics a row that is not finite has a gradient all the same.
            result = (factor * factors)[None, :] * (slopes if RUNNING else (slopes - sums[None, :]) - normal * products[None, :])
            store_entries(dz, row[:, None] * columns + column[None, :], result, inside)
            first += ROWS


def _stacked(given: Tensor) -> tuple[Tensor, int, int]:
    """The tensor as kernels read it, features next to each other, with the strides of rows and experts."""
    dense = given if given.stride(2) == 1 or given.shape[2] == 1 else given.contiguous()
    return raw(dense), dense.stride(0), dense.stride(1)


def _plan(rows: int, columns: int, wide: bool) -> tuple[tuple[int, int], int, dict[str, Any]]:
    """The grid, the rows of a part, and the sizes of blocks."""
    parts = max(1, min(_MOST_PARTS, triton.cdiv(rows, _PART_ROWS)))
    part_rows = triton.cdiv(max(rows, 1), parts)
    block = {"ROWS": 8 if wide else 16, "COLUMNS": 64} if not INTERPRETED else {"ROWS": 256, "COLUMNS": 512}
    parts = triton.cdiv(max(rows, 1), part_rows)
    return (triton.cdiv(columns, block["COLUMNS"]), parts), part_rows, block


def batch_norm_silu(
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward op of :func:`taskloom.batch_norm_silu`."""
    rows, experts, features = z.shape
    dtype = accumulation_dtype(z, weight, bias, running_mean, running_var)
    wide = dtype == torch.float64
    grid, part_rows, block = _plan(rows, experts * features, wide)
    values, row_stride, expert_stride = _stacked(z)
    y = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    mean, var = (torch.empty((experts, features), dtype=dtype, device=z.device) for _ in range(2))
    sizes = (rows, experts, features, row_stride, expert_stride, part_rows)
    running = running_mean is not None and running_var is not None
    if running_mean is not None and running_var is not None:
        first, second = raw(running_mean.contiguous()), raw(running_var.contiguous())
    else:
        first, second = (torch.empty((grid[1], experts, features), dtype=dtype, device=z.device) for _ in range(2))
        launch(batch_moments_kernel, grid, values, first, second, *sizes, WIDE=wide, **block)
    given = [values if one is None else raw(one.contiguous()) for one in (weight, bias)]
    constants = {"EPS": eps, "RUNNING": running, "WEIGHT": weight is not None, "BIAS": bias is not None, "ACTIVATION": activation}
    launch(batch_norm_silu_kernel, grid, values, *given, first, second, raw(y), mean, var, *sizes, grid[1], WIDE=wide, **constants, **block)
    return y, mean, var


def batch_norm_silu_backward(
    gradient: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    running: bool,
    eps: float,
    activation: str,
    for_z: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward op."""
    rows, experts, features = z.shape
    grid, part_rows, block = _plan(rows, experts * features, mean.dtype == torch.float64)
    values, row_stride, expert_stride = _stacked(z)
    slopes, gradient_stride, gradient_expert_stride = _stacked(gradient)
    plain, product = (torch.empty((grid[1], experts, features), dtype=mean.dtype, device=z.device) for _ in range(2))
    dz = torch.empty(z.shape if for_z else (0,), dtype=z.dtype, device=z.device)
    dweight, dbias = (
        z.new_empty(0) if one is None else torch.empty(one.shape if wanted else (0,), dtype=one.dtype, device=z.device)
        for one, wanted in ((weight, for_weight), (bias, for_bias))
    )
    given = [values if one is None else raw(one.contiguous()) for one in (weight, bias)]
    read = (slopes, values, *given, mean.contiguous(), var.contiguous(), plain, product)
    sizes = (rows, experts, features, row_stride, expert_stride, gradient_stride, gradient_expert_stride, part_rows)
    constants = {"EPS": eps, "WEIGHT": weight is not None, "BIAS": bias is not None, "ACTIVATION": activation}
    constants |= {"WIDE": mean.dtype == torch.float64} | block
    launch(batch_norm_sums_kernel, grid, *read, *sizes, **constants)
    constants |= {"RUNNING": running, "FOR_Z": for_z, "FOR_WEIGHT": for_weight and weight is not None}
    constants["FOR_BIAS"] = for_bias and bias is not None
    launch(batch_norm_silu_backward_kernel, grid, *read, raw(dz), raw(dweight), raw(dbias), *sizes, grid[1], **constants)
    return dz, dweight, dbias

"""kernel_merge, kernel_merge_out, kernel_quantile and kernel_merge_backward. The host never waits for the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.triton_kernels.launch import INTERPRETED, flat, launch, programs
from taskloom.triton_kernels.lowrank.kernel_merge_kernels import (
    kernel_backward_kernel,
    kernel_digits_kernel,
    kernel_merge_kernel,
    kernel_next_kernel,
    kernel_row_dots_kernel,
    kernel_row_stats_kernel,
)
from taskloom.triton_kernels.masked.magnitude_ranks import DIGIT_BITS, choose_digit_kernel

# Tiles of entries; the interpreter takes milliseconds for one of any size.
_ROWS, _COLUMNS = (128, 128) if INTERPRETED else (32, 64)
# Rows that a program owns where it goes through all others, and how many others at a time.
_OWNED, _OTHERS = (128, 128) if INTERPRETED else (16, 128)
_SLICE = 16
# Tiles in registers leave few of them to a thread of fewer warps.
_WARPS = 8
# A program adds its histograms to memory once, so it should have counted many tiles.
_MOST_PROGRAMS = 1024
_COUNTED_EXACTLY = 1 << 24


@dataclass(frozen=True)
class Factors:
    """Factors as the kernels take them: [chunks, width, rows] and scalars, in the dtype of the arithmetic."""

    a: Tensor
    b: Tensor
    coef: Tensor
    numbers: Tensor
    kernel: str

    @property
    def wide(self) -> bool:
        """Whether the arithmetic is float64."""
        return self.a.dtype == torch.float64

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """n, m, chunks and width."""
        return self.a.shape[2], self.b.shape[2], self.a.shape[0], self.a.shape[1]

    @property
    def arrays(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What every kernel takes first."""
        return self.a, self.b, self.coef, self.numbers


def lay_out(
    A: Tensor,
    B: Tensor,
    coef: Tensor,
    alpha: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    kernel: str,
    dtype: torch.dtype,
) -> Factors:
    """The factors as the kernels take them."""
    none = torch.zeros((), dtype=dtype, device=A.device)
    numbers = torch.stack([none if one is None else one.reshape(()).to(dtype) for one in (alpha, gamma, beta)])
    a, b = (factor.to(dtype).transpose(1, 2).contiguous() for factor in (A, B))
    return Factors(a, b, coef.to(dtype).contiguous(), numbers, kernel)


def find_row_stats(factors: Factors) -> Tensor:
    """Maximum and sum of exponentials of mixk's rows, [2, n]; empty for other kernels."""
    if factors.kernel != "mixk":
        return factors.a.new_empty((0,))
    n = factors.sizes[0]
    stats = factors.a.new_empty((2, n))
    constants = {"WIDE": factors.wide, "ROWS": _OTHERS, "COLUMNS": _OWNED}
    launch(kernel_row_stats_kernel, (programs(n, _OWNED),), *factors.arrays, stats, *factors.sizes, num_warps=_WARPS, **constants)
    return stats


def _value(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return bits.view(torch.float64) if dtype == torch.float64 else bits.to(torch.int32).view(torch.float32)


def _order_statistics(factors: Factors, stats: Tensor, rank: int, with_next: bool) -> tuple[Tensor, Tensor]:
    """The magnitude of a rank from the smallest, 0-based, and the one after it where asked for; NaN where any entry is NaN."""
    n, m, _, _ = factors.sizes
    device, dtype = factors.a.device, factors.a.dtype
    # Filled on the device: a graph that replays these launches then needs nothing of the host.
    state = torch.zeros(1, 2, dtype=torch.int64, device=device)
    state[:, 1].fill_(n * m - rank)
    largest = torch.zeros(1, dtype=torch.int64, device=device)
    across = programs(n, _COLUMNS)
    grid = (across, max(1, min(programs(m, _ROWS), _MOST_PROGRAMS // across)))
    constants = {"KERNEL": factors.kernel, "WIDE": factors.wide, "ROWS": _ROWS, "COLUMNS": _COLUMNS}
    shift = 63 if factors.wide else 31
    while shift:
        width = min(DIGIT_BITS, shift)
        shift -= width
        counts = torch.zeros(1, 1 << DIGIT_BITS, dtype=torch.int64, device=device)
        arguments = (*factors.arrays, stats, counts, state, largest, *factors.sizes, shift, width)
        launch(kernel_digits_kernel, grid, *arguments, **constants)
        launch(choose_digit_kernel, (1,), counts, state, width)
    infinity = 0x7FF0000000000000 if factors.wide else 0x7F800000
    bits = state[0, :1].clone()
    found = torch.where(largest > infinity, torch.nan, _value(bits, dtype))[0]
    if not with_next:
        return found, found
    least = torch.full((1,), (1 << 63) - 1 if factors.wide else (1 << 31) - 1, dtype=torch.int64, device=device)
    launch(kernel_next_kernel, grid, *factors.arrays, stats, state, least, *factors.sizes, **constants)
    # Where it is not the last of its equals from the top, the next one equals it.
    after = _value(torch.where(state[0, 1:] > 1, bits, least), dtype)
    return found, torch.where(largest > infinity, torch.nan, after)[0]


def find_threshold(factors: Factors, stats: Tensor, sparsity: float, gate: str) -> Tensor:
    """The threshold that a gate takes, a scalar; its ranks are those of the reference."""
    n, m, _, _ = factors.sizes
    count, dtype = n * m, factors.a.dtype
    if gate == "none" or count == 0:
        return factors.a.new_zeros(())
    if gate == "soft":
        rank = min(math.ceil(sparsity * count), count)
        return _order_statistics(factors, stats, rank - 1, False)[0] if rank > 0 else factors.a.new_zeros(())
    place = torch.tensor(sparsity, dtype=dtype if count <= _COUNTED_EXACTLY else torch.float64) * (count - 1)
    below = min(int(place), count - 1)
    weight = (place - below).to(dtype).item()
    return torch.lerp(*_order_statistics(factors, stats, below, weight > 0), weight)


def merge(factors: Factors, stats: Tensor, threshold: Tensor, base: Tensor | None, out: Tensor, gate: str) -> None:
    """Write base + gated entries to a contiguous ``out`` [m, n]."""
    n, m, _, _ = factors.sizes
    origin = out if base is None else base
    constants = {"KERNEL": factors.kernel, "GATE": gate, "HAS_BASE": base is not None, "WIDE": factors.wide}
    arguments = (*factors.arrays, stats, threshold, flat(origin), flat(out), *factors.sizes)
    grid = (programs(n, _COLUMNS), programs(m, _ROWS))
    launch(kernel_merge_kernel, grid, *arguments, num_warps=_WARPS, **constants, ROWS=_ROWS, COLUMNS=_COLUMNS)


def gradients(factors: Factors, stats: Tensor, threshold: Tensor, gradient: Tensor, gate: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of A, B, coef and (alpha, gamma, beta)."""
    n, m, chunks, width = factors.sizes
    device, dtype = factors.a.device, factors.a.dtype
    upstream = flat(gradient)
    others = _OTHERS // 2 if factors.wide else _OTHERS
    tiles = {"WIDE": factors.wide, "ROWS": others, "COLUMNS": _OWNED}
    dots = torch.zeros(n if factors.kernel == "mixk" else 1, dtype=dtype, device=device)
    plain = torch.zeros(max(programs(n, _OWNED), 1), dtype=torch.float64, device=device)
    if factors.kernel == "mixk":
        arguments = (upstream, *factors.arrays, stats, threshold, dots, plain, *factors.sizes)
        launch(kernel_row_dots_kernel, (programs(n, _OWNED),), *arguments, num_warps=_WARPS, GATE=gate, **tiles)
    slices = triton.cdiv(width, _SLICE)
    sums = torch.zeros(max(programs(n, _OWNED), 1), chunks, 4, dtype=torch.float64, device=device)
    found = []
    for for_a, rows in ((True, n), (False, m)):
        out = torch.empty(chunks, width, rows, dtype=dtype, device=device)
        shape = tiles if for_a else tiles | {"ROWS": _OWNED, "COLUMNS": others}
        constants = {"KERNEL": factors.kernel, "GATE": gate, "FOR_A": for_a, "SLICE": _SLICE, **shape}
        arguments = (upstream, *factors.arrays, stats, threshold, dots, out, sums, *factors.sizes, slices)
        launch(kernel_backward_kernel, (programs(rows, _OWNED), chunks * slices), *arguments, num_warps=_WARPS, **constants)
        found.append(torch.empty(chunks, rows, width, dtype=dtype, device=device).copy_(out.transpose(1, 2)))
    totals = sums.sum(0)
    scalars = totals[0, 1:].clone()
    if factors.kernel == "mixk":
        scalars[0], scalars[2] = dots.sum(dtype=torch.float64), plain.sum()
        scalars[1] /= -factors.numbers[1]
    return found[0], found[1], totals[:, 0].clone(memory_format=torch.contiguous_format).to(dtype), scalars.to(dtype)


def kernel_quantile(
    A: Tensor,
    B: Tensor,
    coef: Tensor,
    alpha: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    kernel: str,
    sparsity: float,
    gate: str,
) -> Tensor:
    """Launch :func:`taskloom.kernel_quantile`."""
    factors = lay_out(A, B, coef, alpha, gamma, beta, kernel, accumulation_dtype(A, B, coef, alpha, gamma, beta))
    return find_threshold(factors, find_row_stats(factors), sparsity, gate)


def _merge_into(
    A: Tensor,
    B: Tensor,
    coef: Tensor,
    alpha: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    base: Tensor | None,
    kernel: str,
    sparsity: float,
    gate: str,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    factors = lay_out(A, B, coef, alpha, gamma, beta, kernel, accumulation_dtype(A, B, coef, alpha, gamma, beta, base))
    stats = find_row_stats(factors)
    threshold = find_threshold(factors, stats, sparsity, gate)
    merge(factors, stats, threshold, base, out, gate)
    return threshold, stats


def kernel_merge(
    A: Tensor,
    B: Tensor,
    coef: Tensor,
    alpha: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    base: Tensor | None,
    kernel: str,
    sparsity: float,
    gate: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch :func:`taskloom.kernel_merge`; the merged matrix, the threshold and the statistics of rows."""
    out = torch.empty(B.shape[1], A.shape[1], dtype=A.dtype if base is None else base.dtype, device=A.device)
    return out, *_merge_into(A, B, coef, alpha, gamma, beta, base, kernel, sparsity, gate, out)


def kernel_merge_out(*arguments: Any) -> None:
    """Launch :func:`taskloom.kernel_merge` into its last argument ``out``, which may be base itself."""
    _merge_into(*arguments)


def kernel_merge_backward(
    gradient: Tensor,
    A: Tensor,
    B: Tensor,
    coef: Tensor,
    alpha: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    threshold: Tensor,
    row_stats: Tensor,
    kernel: str,
    gate: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch :func:`taskloom.ops.lowrank.kernel_merge_backward`."""
    dtype = accumulation_dtype(A, B, coef, alpha, gamma, beta, threshold)
    factors = lay_out(A, B, coef, alpha, gamma, beta, kernel, dtype)
    return gradients(factors, row_stats.to(dtype).contiguous(), threshold.to(dtype), gradient, gate)

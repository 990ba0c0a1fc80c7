"""kernel_linear and its backward: the merge's kernels around torch's matrix products."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.triton_kernels.lowrank.kernel_merge import Factors, find_row_stats, find_threshold, gradients, lay_out, merge


def _merged(factors: Factors, stats: Tensor, threshold: Tensor, base: Tensor | None, dtype: torch.dtype, gate: str) -> Tensor:
    n, m, _, _ = factors.sizes
    out = torch.empty(m, n, dtype=dtype, device=factors.a.device)
    merge(factors, stats, threshold, base, out, gate)
    return out


def _apart(x: Tensor) -> bool:
    """Whether base and merge are multiplied one after the other: a sum in 16 bits would lose updates below the base's rounding."""
    return x.dtype in (torch.bfloat16, torch.float16) and x.device.type != "cpu"


def _working(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    return x.dtype if _apart(x) else dtype


def kernel_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    coef: Tensor,
    alpha: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    base: Tensor | None,
    bias: Tensor | None,
    kernel: str,
    sparsity: float,
    gate: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch :func:`taskloom.kernel_linear`; the outputs, the threshold and the statistics of rows."""
    dtype = accumulation_dtype(x, A, B, coef, alpha, gamma, beta, base, bias)
    factors = lay_out(A, B, coef, alpha, gamma, beta, kernel, dtype)
    stats = find_row_stats(factors)
    threshold = find_threshold(factors, stats, sparsity, gate)
    work = _working(x, dtype)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(work)
    offset = None if bias is None else bias.to(work)
    merged = _merged(factors, stats, threshold, None if _apart(x) else base, work, gate)
    if _apart(x) and base is not None:
        y = torch.nn.functional.linear(rows, base.to(work), offset).addmm_(rows, merged.T)
    else:
        y = torch.nn.functional.linear(rows, merged, offset)
    return y.reshape(*x.shape[:-1], B.shape[1]).to(x.dtype), threshold, stats


def kernel_linear_backward(
    gradient: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    coef: Tensor,
    alpha: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    base: Tensor | None,
    threshold: Tensor,
    row_stats: Tensor,
    kernel: str,
    gate: str,
    for_x: bool,
    for_base: bool,
    for_factors: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch :func:`taskloom.ops.lowrank.kernel_linear_backward`."""
    dtype = accumulation_dtype(A, B, coef, alpha, gamma, beta, threshold)
    factors = lay_out(A, B, coef, alpha, gamma, beta, kernel, dtype)
    stats, cut = row_stats.to(dtype).contiguous(), threshold.to(dtype)
    work = _working(x, dtype)
    count = math.prod(x.shape[:-1])
    rows = gradient.reshape(count, gradient.shape[-1]).to(work)
    none = factors.a.new_empty((0,))
    for_input = x.new_empty((0,))
    if for_x:
        weight = _merged(factors, stats, cut, None if _apart(x) else base, work, gate)
        product = rows @ weight
        if _apart(x) and base is not None:
            product.addmm_(rows, base.to(work))
        for_input = product.reshape(x.shape).to(x.dtype)
    thin, for_weight = (none, none.clone(), none.clone(), none.clone()), none.clone()
    if for_base or for_factors:
        upstream = rows.T @ x.reshape(count, x.shape[-1]).to(work)
        if for_factors:
            thin = gradients(factors, stats, cut, upstream, gate)
        if for_base:
            for_weight = upstream.to(dtype).contiguous()
    return for_input, *thin, for_weight

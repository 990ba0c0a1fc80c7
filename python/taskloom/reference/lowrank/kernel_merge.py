"""A full-rank matrix made of two thin factors by a kernel, sparsified by a quantile of its magnitudes, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype

KERNELS = ("linear", "pwl", "sigmoid", "rbf", "mixk")
GATES = ("magnitude", "soft", "hard")


def _squared_distances(A: Tensor, B: Tensor) -> Tensor:
    """||A_p[i] - B_p[j]||^2 as [P, n, m], by differences: no product of which two large numbers are taken apart again."""
    return (A[:, :, None, :] - B[:, None, :, :]).square().sum(-1)


def _distances(A: Tensor, B: Tensor) -> Tensor:
    """Distances, with a gradient of 0 where two rows coincide."""
    squared = _squared_distances(A, B)
    apart = squared > 0
    return torch.where(apart, torch.where(apart, squared, 1).sqrt(), 0)


def kernel_values(
    A: Tensor, B: Tensor, coef: Tensor, kernel: str, alpha: Tensor | None, gamma: Tensor | None, beta: Tensor | None
) -> Tensor:
    """The kernel of every pair of rows: [n, m] of A [P, n, K], B [P, m, K], coef [P].

    linear: sum_p c_p a_p.b_p. pwl: M = sum_p c_p ||a_p - b_p||. mixk: M + alpha softmax_j(M / gamma) + beta. sigmoid and rbf take a row's
    chunks as one vector: alpha s(beta a.b) + gamma, and alpha exp(-beta ||a - b||^2) + gamma.
    """
    scale = coef[:, None, None]
    if kernel == "linear":
        return (scale * (A @ B.mT)).sum(0)
    if kernel in ("pwl", "mixk"):
        mixed = (scale * _distances(A, B)).sum(0)
        if kernel == "pwl":
            return mixed
        assert alpha is not None
        assert gamma is not None
        assert beta is not None
        return mixed + alpha * torch.softmax(mixed / gamma, 1) + beta
    assert alpha is not None
    assert gamma is not None
    assert beta is not None
    if kernel == "sigmoid":
        return alpha * torch.sigmoid(beta * (A @ B.mT).sum(0)) + gamma
    return alpha * torch.exp(-beta * _squared_distances(A, B).sum(0)) + gamma


def kernel_quantile(values: Tensor, sparsity: float, gate: str) -> Tensor:
    """The threshold that a gate takes of |values|.

    "magnitude" and "hard": the quantile with linear interpolation, its rank in the dtype of the values, as torch.quantile has it for up to
    2^24 values. "soft": the ceil(sparsity * N)-th smallest magnitude, 0 where that rank is 0.
    """
    ordered = values.detach().abs().flatten().sort().values
    if gate == "soft":
        rank = math.ceil(sparsity * len(ordered))
        return ordered[rank - 1] if rank > 0 else ordered.new_zeros(())
    place = torch.tensor(sparsity, dtype=values.dtype) * (len(ordered) - 1)
    below = int(place.floor())
    return torch.lerp(ordered[below], ordered[min(below + 1, len(ordered) - 1)], (place - below).to(values.device))


def gated(values: Tensor, threshold: Tensor, gate: str | None) -> Tensor:
    """The values above a threshold in magnitude, weighted as the gate says; the gate's factor is a constant to autograd, but for "soft"."""
    if gate is None:
        return values
    magnitudes = values.abs()
    above = magnitudes > threshold
    if gate == "magnitude":
        return values * (magnitudes.detach() * above)
    if gate == "soft":
        return values * torch.where(above, magnitudes - threshold, 0)
    return values * above


def kernel_merge(
    A: Tensor,
    B: Tensor,
    coef: Tensor,
    kernel: str = "mixk",
    alpha: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    sparsity: float = 0.0,
    gate: str | None = "magnitude",
    base: Tensor | None = None,
) -> Tensor:
    """Base + gated(kernel)^T as [m, n], rounded once to base's dtype, or to that of the factors."""
    dtype = accumulation_dtype(A, B, coef, alpha, gamma, beta, base)
    wide = [None if one is None else one.to(dtype) for one in (A, B, coef, alpha, gamma, beta)]
    assert wide[0] is not None
    assert wide[1] is not None
    assert wide[2] is not None
    values = kernel_values(wide[0], wide[1], wide[2], kernel, *wide[3:])
    threshold = values.new_zeros(()) if gate is None else kernel_quantile(values, sparsity, gate)
    merged = gated(values, threshold, gate).T
    return merged.to(A.dtype) if base is None else (base.to(dtype) + merged).to(base.dtype)


def kernel_linear(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    coef: Tensor,
    kernel: str = "mixk",
    alpha: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    sparsity: float = 0.0,
    gate: str | None = "magnitude",
    base: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """X kernel_merge(...)^T + bias, rounded to x's dtype: x [..., n] to [..., m]."""
    dtype = accumulation_dtype(x, A, B, coef, alpha, gamma, beta, base, bias)
    # The sum stays in that dtype until the product is rounded.
    wide = None if base is None else base.to(dtype)
    merged = kernel_merge(A.to(dtype), B.to(dtype), coef, kernel, alpha, gamma, beta, sparsity, gate, wide)
    y = x.to(dtype) @ merged.T
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)

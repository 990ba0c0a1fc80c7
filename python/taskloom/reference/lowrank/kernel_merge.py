"""A full-rank matrix made of two thin factors by a kernel, sparsified by a quantile of its magnitudes, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype, without_autocast

KERNELS = ("linear", "pwl", "sigmoid", "rbf", "mixk")
GATES = ("magnitude", "soft", "hard")


def _squared_distances(A: Tensor, B: Tensor) -> Tensor:
    """||A_p[i] - B_p[j]||^2 as [P, n, m], by differences: no product of which two large numbers are taken apart again."""
    total = A.new_zeros(A.shape[0], A.shape[1], B.shape[1])
    for own, other in zip(A.unbind(2), B.unbind(2), strict=True):
        total = total + (own[:, :, None] - other[:, None, :]).square()
    return total


def _distances(A: Tensor, B: Tensor) -> Tensor:
    """Distances, with a gradient of 0 where two rows coincide."""
    squared = _squared_distances(A, B)
    apart = squared != 0
    return torch.where(apart, torch.where(apart, squared, 1).sqrt(), 0)


@without_autocast
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


def gate_threshold(values: Tensor, sparsity: float, gate: str) -> Tensor:
    """The threshold that a gate takes of |values|; NaN where one of them is.

    "magnitude" and "hard": the quantile with linear interpolation. Up to 2^24 values its rank is computed in their dtype, as torch.quantile
    does; beyond, where torch.quantile refuses and float32 cannot count, in float64. "soft": the ceil(sparsity * N)-th smallest magnitude, 0
    where that rank is 0.
    """
    ordered = values.detach().abs().flatten().sort().values
    count = len(ordered)
    if count == 0:
        return ordered.new_zeros(())
    if gate == "soft":
        rank = min(math.ceil(sparsity * count), count)
        if rank == 0:
            return ordered.new_zeros(())
        found = ordered[rank - 1]
    else:
        place = torch.tensor(sparsity, dtype=values.dtype if count <= 1 << 24 else torch.float64) * (count - 1)
        below = min(int(place), count - 1)
        weight = (place - below).to(values.device, values.dtype)
        found = torch.lerp(ordered[below], ordered[min(math.ceil(place), count - 1)], weight)
    return torch.where(ordered[-1].isnan(), ordered[-1], found)


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


def kernel_quantile(
    A: Tensor,
    B: Tensor,
    coef: Tensor,
    kernel: str = "mixk",
    alpha: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    sparsity: float = 0.0,
    gate: str = "magnitude",
) -> Tensor:
    """The threshold that kernel_merge's gate takes."""
    dtype = accumulation_dtype(A, B, coef, alpha, gamma, beta)
    narrow = (A, B, coef, alpha, gamma, beta)
    a, b, c, *scalars = (None if one is None else one.to(dtype) for one in narrow)
    assert a is not None
    assert b is not None
    assert c is not None
    return gate_threshold(kernel_values(a, b, c, kernel, *scalars), sparsity, gate)


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
    threshold = values.new_zeros(()) if gate is None else gate_threshold(values, sparsity, gate)
    merged = gated(values, threshold, gate).T
    return merged.to(A.dtype) if base is None else (base.to(dtype) + merged).to(base.dtype)


@without_autocast
def kernel_merge_backward(
    gradient: Tensor,
    A: Tensor,
    B: Tensor,
    coef: Tensor,
    threshold: Tensor,
    kernel: str = "mixk",
    alpha: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    gate: str | None = "magnitude",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of A, B, coef and (alpha, gamma, beta) for a threshold that is a constant, by autograd in float64."""
    inputs = (A, B, coef, alpha, gamma, beta)
    with torch.enable_grad():
        leaves = [None if one is None else one.detach().double().requires_grad_() for one in inputs]
        a, b, c, *scalars = leaves
        assert a is not None
        assert b is not None
        assert c is not None
        merged = gated(kernel_values(a, b, c, kernel, *scalars), threshold.double(), gate).T
        wanted = [leaf for leaf in leaves if leaf is not None]
        found = torch.autograd.grad(merged, wanted, gradient.double(), materialize_grads=True, allow_unused=True)
    by_leaf = dict(zip(map(id, wanted), found, strict=True))
    numbers = [merged.new_zeros(()) if one is None else by_leaf[id(one)].reshape(()) for one in scalars]
    dtype = threshold.dtype
    return by_leaf[id(a)].to(dtype), by_leaf[id(b)].to(dtype), by_leaf[id(c)].to(dtype), torch.stack(numbers).detach().to(dtype)


@without_autocast
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


@without_autocast
def kernel_linear_backward(
    gradient: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    coef: Tensor,
    threshold: Tensor,
    kernel: str = "mixk",
    alpha: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    gate: str | None = "magnitude",
    base: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, A, B, coef, (alpha, gamma, beta) and of the merged weight, for a threshold that is a constant."""
    scalars = [None if one is None else one.double() for one in (alpha, gamma, beta)]
    count = math.prod(x.shape[:-1])
    rows, inputs = gradient.double().reshape(count, gradient.shape[-1]), x.double().reshape(count, x.shape[-1])
    weight = gated(kernel_values(A.double(), B.double(), coef.double(), kernel, *scalars), threshold.double(), gate).T
    merged = weight if base is None else base.double() + weight
    for_weight = rows.T @ inputs
    thin = kernel_merge_backward(for_weight, A, B, coef, threshold, kernel, alpha, gamma, beta, gate)
    return (rows @ merged).reshape(x.shape).to(x.dtype), *thin, for_weight.to(threshold.dtype)

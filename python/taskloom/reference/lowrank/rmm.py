"""Per-position principal components of several low-rank adapters, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype, without_autocast


@without_autocast
def rmm_fit(vectors: Tensor, rank: int, center: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [P, r], basis [P, p, r] and coefficients [n, P, p] of ``vectors`` [n, P, r], at each position alone; p is ``rank``.

    The basis holds the top left singular vectors of the centred vectors, each with its entry of largest magnitude positive; a direction
    in which they differ by no more than rounding is 0. Everything is computed in float64.
    """
    wide = vectors.double().transpose(0, 1)
    mean = wide.mean(1) if center else wide.new_zeros(wide.shape[0], wide.shape[2])
    centred = wide - mean[:, None]
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    kept = directions[:, :rank]
    largest = kept.gather(2, kept.abs().argmax(2, keepdim=True))
    # What rounding leaves of vectors that are equal is no direction.
    floor = rounding_floor(wide, accumulation_dtype(vectors))
    basis = torch.where((values[:, :rank] > floor)[:, :, None], kept * largest.sign(), 0).contiguous()
    coefficients = (centred @ basis.mT).transpose(0, 1).contiguous()
    return mean.to(vectors.dtype), basis.to(vectors.dtype), coefficients.to(vectors.dtype)


def rounding_floor(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding leaves of a direction [P, 1] of vectors [P, n, r]: that of float64, or what their own ``dtype`` brings along."""
    computed = torch.finfo(torch.float64).eps * max(wide.shape[1:])
    length: Tensor = torch.linalg.vector_norm(wide, dim=(1, 2))
    return length[:, None] * max(computed, torch.finfo(dtype).eps)


@without_autocast
def rmm_reconstruct(mean: Tensor, basis: Tensor, coefficients: Tensor) -> Tensor:
    """Mean + coefficients basis at each position: [P, r] of [P, r], [P, p, r] and one task's [P, p]; rounded once."""
    dtype = accumulation_dtype(mean, basis, coefficients)
    added = torch.einsum("qp,qpr->qr", coefficients.to(dtype), basis.to(dtype))
    return (mean.to(dtype) + added).to(mean.dtype)


@without_autocast
def rmm_linear(
    x: Tensor,
    task: Tensor,
    mean_a: Tensor,
    basis_a: Tensor,
    coef_a: Tensor,
    mean_b: Tensor,
    basis_b: Tensor,
    coef_b: Tensor,
) -> Tensor:
    """X (A_t B_t)^T per row with its task's adapter, without forming any A_t or B_t: [N, m] of x [N, d] and task [N].

    Positions of A are the m rows, of B the d columns: mean_a [m, r], basis_a [m, p, r], coef_a [n, m, p]; mean_b [d, r], basis_b [d, p, r],
    coef_b [n, d, p].
    """
    dtype = accumulation_dtype(x, mean_a, basis_a, coef_a, mean_b, basis_b, coef_b)
    chosen = task.long()
    inner = rmm_inner(x, chosen, mean_b, basis_b, coef_b, dtype)
    y = inner @ mean_a.to(dtype).T
    for k in range(basis_a.shape[1]):
        y = y + (inner @ basis_a[:, k].to(dtype).T) * coef_a[chosen, :, k].to(dtype)
    return y.to(x.dtype)


@without_autocast
def rmm_inner(x: Tensor, task: Tensor, mean: Tensor, basis: Tensor, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    """X V_t per row with its task's vectors V_t [P, r]: [N, r] in ``dtype`` of x [N, P]."""
    rows = x.to(dtype)
    inner = rows @ mean.to(dtype)
    for k in range(basis.shape[1]):
        inner = inner + (rows * coefficients[task, :, k].to(dtype)) @ basis[:, k].to(dtype)
    return inner

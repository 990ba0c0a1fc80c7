"""Per-position principal components of several low-rank adapters, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype


def rmm_fit(vectors: Tensor, rank: int, center: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [P, r], basis [P, p, r] and coefficients [n, P, p] of ``vectors`` [n, P, r], at each position alone; p is ``rank``.

    The basis holds the top left singular vectors of the centred vectors, each with its entry of largest magnitude positive; a direction
    in which they differ by no more than rounding is 0.
    """
    dtype = accumulation_dtype(vectors)
    wide = vectors.to(dtype).transpose(0, 1)
    mean = wide.mean(1) if center else wide.new_zeros(wide.shape[0], wide.shape[2])
    centred = wide - mean[:, None]
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    kept = directions[:, :rank]
    largest = kept.gather(2, kept.abs().argmax(2, keepdim=True))
    # What rounding leaves of vectors that are equal is no direction.
    floor = torch.linalg.vector_norm(wide, dim=(1, 2))[:, None] * torch.finfo(dtype).eps * max(centred.shape[1:])
    basis = torch.where((values[:, :rank] > floor)[:, :, None], kept * largest.sign(), 0)
    coefficients = centred @ basis.mT
    return mean.to(vectors.dtype), basis.to(vectors.dtype), coefficients.transpose(0, 1).contiguous().to(vectors.dtype)


def rmm_reconstruct(mean: Tensor, basis: Tensor, coefficients: Tensor) -> Tensor:
    """Mean + coefficients basis at each position: [P, r] of [P, r], [P, p, r] and one task's [P, p]; rounded once."""
    dtype = accumulation_dtype(mean, basis, coefficients)
    added = torch.einsum("qp,qpr->qr", coefficients.to(dtype), basis.to(dtype))
    return (mean.to(dtype) + added).to(mean.dtype)


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
    rows, chosen = x.to(dtype), task.long()
    inner = rows @ mean_b.to(dtype)
    for k in range(basis_b.shape[1]):
        inner = inner + (rows * coef_b.to(dtype)[chosen, :, k]) @ basis_b.to(dtype)[:, k]
    y = inner @ mean_a.to(dtype).T
    for k in range(basis_a.shape[1]):
        y = y + (inner @ basis_a.to(dtype)[:, k].T) * coef_a.to(dtype)[chosen, :, k]
    return y.to(x.dtype)

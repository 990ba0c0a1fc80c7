"""rmm_fit for GPUs without the CUDA library: torch's batched eigenproblems of each position's smaller Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.reference.lowrank.rmm import rounding_floor


def _orthonormal(weighted: Tensor, floor: Tensor) -> Tensor:
    """Orthonormal rows [P, p, r] of sums [P, p, r] that are nearly orthogonal already; 0 for a row that adds nothing beyond the floor."""
    q, triangle = torch.linalg.qr(weighted.mT)
    lengths = triangle.diagonal(dim1=1, dim2=2).abs()
    return torch.where((lengths > floor)[:, :, None], q.mT, 0)


def rmm_fit(vectors: Tensor, rank: int, center: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute :func:`taskloom.rmm_fit`."""
    tasks, positions, width = vectors.shape
    wide = vectors.double().transpose(0, 1)
    floor = rounding_floor(wide, accumulation_dtype(vectors))
    mean = wide.mean(1) if center else wide.new_zeros(positions, width)
    centred = wide - mean[:, None]
    by_task = width > tasks
    gram = centred @ centred.mT if by_task else centred.mT @ centred
    # Eigenvalues rise.
    basis = torch.linalg.eigh(gram).eigenvectors.flip(2)[:, :, :rank].mT
    if by_task:
        basis = _orthonormal(basis @ centred, floor)
    largest = basis.gather(2, basis.abs().argmax(2, keepdim=True))
    basis = basis * torch.where(largest < 0, -1.0, 1.0)
    coefficients = centred @ basis.mT
    kept = torch.linalg.vector_norm(coefficients, dim=1) > floor
    basis = torch.where(kept[:, :, None], basis, 0)
    coefficients = torch.where(kept[:, None], coefficients, 0).transpose(0, 1)
    # A copy in this format has its strides even where it has no entries.
    plain = torch.contiguous_format
    mean, basis, coefficients = (part.to(vectors.dtype).clone(memory_format=plain) for part in (mean, basis, coefficients))
    return mean, basis, coefficients

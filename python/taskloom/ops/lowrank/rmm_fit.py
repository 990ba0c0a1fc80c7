"""Principal components of several tasks' vectors at each position."""

from __future__ import annotations

import torch
from torch import Tensor

from taskloom.ops._backends import kernel
from taskloom.ops._checks import check_floating
from taskloom.ops._register import register
from taskloom.reference import lowrank as reference


def rmm_fit(vectors: Tensor, rank: int, center: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Fit a mean and a few directions to the tasks' vectors, at each position alone.

    A position is a row of a low-rank factor A [m, r], or a column of B [r, d]; each task has a vector of r entries there.

    Parameters
    ----------
    vectors
        Shape ``[n, P, r]``: n tasks' vectors at P positions, finite; float32, bfloat16, float16 or float64.
    rank
        Directions p that are kept, from 1 to ``min(r, n - 1)`` (``min(r, n)`` without ``center``), where the fit is exact.
    center
        Whether to take the mean off first. Default True; False gives a mean of zeros.

    Returns
    -------
    mean : Tensor
        Shape ``[P, r]``, in the dtype of ``vectors``.
    basis : Tensor
        Shape ``[P, p, r]``: orthonormal directions by decreasing singular value, the entry of largest magnitude of each positive. A
        direction in which the vectors differ by no more than rounding is 0.
    coefficients : Tensor
        Shape ``[n, P, p]``. ``mean + coefficients[i] basis`` is nearest to ``vectors[i]``: the squared error over all tasks is the sum of
        the squares of the singular values that are left out.

    Raises
    ------
    TypeError
        If vectors is of another dtype, or rank no integer.
    ValueError
        If vectors has not three dimensions, or rank is out of range.
    RuntimeError
        If a gradient flows into the result: it has none.

    Notes
    -----
    Source: reversible model merging, arXiv 2510.14163. The arithmetic is float64 for every dtype: cyclic Jacobi on the smaller of the
    Gram matrices of a position, whose directions are made orthonormal once more. The result is rounded once, and does not depend on the
    number of threads. The CUDA kernel does the same arithmetic; it takes at most 4096 tasks of 16384 entries.
    """
    op = "rmm_fit"
    check_floating(op, "vectors", vectors)
    if vectors.dim() != 3:
        raise ValueError(f"{op}: vectors: expected shape [n, P, r], got {tuple(vectors.shape)}")
    tasks, _, width = vectors.shape
    if isinstance(rank, bool) or not isinstance(rank, (int, torch.SymInt)):
        raise TypeError(f"{op}: rank: expected an integer, got {type(rank).__name__}")
    largest = min(width, tasks - 1 if center else tasks)
    if not 1 <= rank <= largest:
        less = "one less than the tasks" if center else "the tasks"
        raise ValueError(
            f"{op}: rank: expected 1 to {largest}, the smaller of the vectors' {width} entries and {less} ({tasks}), got {rank}"
        )
    run = kernel(op, vectors)
    mean, basis, coefficients = (reference.rmm_fit if run is None else run)(vectors, rank, center)
    return mean, basis, coefficients


def _fake_rmm_fit(vectors: Tensor, rank: int, center: bool) -> tuple[Tensor, Tensor, Tensor]:
    tasks, positions, width = vectors.shape
    shapes: tuple[tuple[int, ...], ...] = ((positions, width), (positions, rank, width), (tasks, positions, rank))
    mean, basis, coefficients = (torch.empty(shape, dtype=vectors.dtype, device=vectors.device) for shape in shapes)
    return mean, basis, coefficients


register("rmm_fit", fake=_fake_rmm_fit)

"""kernel_quantile where a sample misleads: ties, clusters, and ranks at the ends, on both sides of the sizes that are sampled."""

from __future__ import annotations

import pytest
import torch
from cases_kernel_merge import factors
from contract import assert_same_bits
from samples import weights
from torch import Tensor

import taskloom

Factors = tuple[Tensor, Tensor, Tensor]


def _equal(dtype: torch.dtype) -> Factors:
    """Of which every magnitude is the same."""
    return torch.zeros(1, 301, 2, dtype=dtype), torch.ones(1, 503, 2, dtype=dtype), torch.ones(1, dtype=dtype)


def _few(dtype: torch.dtype) -> Factors:
    """Of which a few magnitudes are each of many entries."""
    A, B, coef = factors(301, 503, dtype=dtype)
    return A[:, torch.arange(301) % 3], B[:, torch.arange(503) % 2], coef


def _rare(dtype: torch.dtype) -> Factors:
    """A few rows far larger than all others, which a sample of rows may miss."""
    A, B, coef = factors(301, 503, dtype=dtype)
    B[:, ::101] *= 1e4
    return A, B, coef


def _clustered(dtype: torch.dtype) -> Factors:
    """Rows in order of their size: entries of one row are alike."""
    A, B, coef = factors(257, 601, dtype=dtype)
    return A, B * torch.logspace(-3, 3, 601, dtype=dtype)[:, None], coef


def _whole(dtype: torch.dtype) -> Factors:
    """Few enough that there is no sample."""
    return factors(251, 261, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("made", [_equal, _few, _rare, _clustered, _whole])
@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.usefixtures("restored_threads")
def test_order_statistics_are_exact(made: object, dtype: torch.dtype, keeps: bool) -> None:
    assert callable(made)
    A, B, coef = made(dtype)
    values = taskloom.kernel_merge(A, B, coef, kernel="pwl", gate=None)
    ordered = values.abs().flatten().sort().values
    for count in (1, 2, 77, len(ordered) // 2, len(ordered) * 9 // 10, len(ordered) - 1, len(ordered)):
        # soft takes the ceil(sparsity N)-th magnitude, and keeps those that are larger.
        sparsity = (count - 0.5) / len(ordered)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            if keeps:
                merged = taskloom.kernel_merge(A, B, coef, kernel="pwl", gate="soft", sparsity=sparsity)
                cut = ordered[count - 1]
                assert_same_bits(merged, values * torch.where(values.abs() > cut, values.abs() - cut, 0))
            else:
                assert_same_bits(taskloom.kernel_quantile(A, B, coef, kernel="pwl", gate="soft", sparsity=sparsity), ordered[count - 1])


@pytest.mark.parametrize("kernel", ["mixk", "pwl", "rbf"])
def test_a_nan_among_many(kernel: str) -> None:
    A, B, coef = factors(301, 503)
    B[0, 17, 1] = torch.nan
    assert taskloom.kernel_quantile(A, B, coef, kernel=kernel, sparsity=0.5).isnan()
    merged = taskloom.kernel_merge(A, B, coef, kernel=kernel, gate="hard", sparsity=0.5, base=weights(503, 301))
    assert merged[17].isnan().all()

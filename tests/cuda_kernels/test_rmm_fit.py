"""The CUDA kernel of rmm_fit does the CPU's arithmetic: the same bits, for any number of lanes to a position and wherever it works."""

from __future__ import annotations

import emulated
import pytest
import torch
from samples import normal
from torch import Tensor

import taskloom


def _both(vectors: Tensor, rank: int, center: bool = True) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What the emulated kernel gives, and what the CPU's gives."""
    assert taskloom.ops is not None
    emulated.library()
    ours = torch.ops.taskloom_emulated.rmm_fit.default(vectors, rank, center)
    return ours, torch.ops.taskloom.rmm_fit.default(vectors, rank, center)


def _assert_same(vectors: Tensor, rank: int, center: bool = True) -> None:
    for got, expected in zip(*_both(vectors, rank, center), strict=True):
        assert got.shape == expected.shape
        assert got.is_contiguous()
        # Zeros of either sign are equal.
        assert got.equal(expected)


# tasks, positions, width, rank: 4, 8, 16 and 32 lanes to a position, and positions that shared memory does not hold.
SIZES = {
    "4 lanes": (3, 70, 5, 2),
    "8 lanes": (11, 19, 30, 4),
    "8 lanes for wide vectors": (4, 9, 200, 3),
    "16 lanes": (40, 5, 24, 5),
    "32 lanes": (35, 3, 37, 3),
    "32 lanes for wide vectors": (6, 3, 600, 2),
    "global memory": (34, 9, 120, 2),
    "global memory by task": (5, 11, 1500, 2),
}


@pytest.mark.parametrize("name", SIZES)
def test_bits_are_those_of_the_cpu(name: str, order: str) -> None:
    tasks, positions, width, rank = SIZES[name]
    _assert_same(normal(tasks, positions, width), rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("center", [True, False])
def test_every_dtype(dtype: torch.dtype, center: bool) -> None:
    _assert_same(normal(6, 37, 16, dtype=dtype), 4, center)
    _assert_same(normal(9, 37, 4, dtype=dtype), 4, center)


def test_any_strides() -> None:
    base = normal(16, 12, 14)
    for vectors in (
        base.permute(1, 2, 0),
        base.permute(2, 0, 1)[::2],
        base[:, 1::3, ::2],
        base[:1].expand(5, 12, 14),
        base.transpose(1, 2),
    ):
        _assert_same(vectors, 2)


def test_directions_of_very_different_lengths_and_none() -> None:
    lengths = 10.0 ** -torch.arange(12, dtype=torch.float64)
    vectors = normal(7, 20, 12, dtype=torch.float64) * lengths
    vectors[:, 3] = 0
    vectors[:, 4] = vectors[:1, 4]
    vectors[:, 5, 1:] = 0
    _assert_same(vectors, 6)
    _assert_same(normal(7, 20, 12) * lengths.float(), 6)


def test_values_that_are_not_finite_stay_at_their_position() -> None:
    vectors = normal(5, 40, 7)
    vectors[2, 11, 3] = float("nan")
    vectors[2, 30, 3] = float("inf")
    others = [place for place in range(40) if place not in (11, 30)]
    (mean, basis, coefficients), expected = _both(vectors, 3)
    assert mean[11].isnan().equal(expected[0][11].isnan())
    for got, known in ((mean[others], expected[0][others]), (basis[others], expected[1][others])):
        assert got.equal(known)
    assert coefficients[:, others].equal(expected[2][:, others])


@pytest.mark.parametrize(
    ("shape", "rank", "message"),
    [
        ((3, 4), 1, "vectors: expected three dimensions, got 2"),
        ((3, 4, 5), 4, "rank: expected 1 to 3, got 4"),
        ((5000, 1, 2), 1, "at most 4096 tasks"),
    ],
)
def test_what_it_refuses(shape: tuple[int, ...], rank: int, message: str) -> None:
    emulated.library()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.taskloom_emulated.rmm_fit.default(torch.ones(shape), rank, True)

"""The GPU's search for magnitude ranks beyond the contract's cases: several blocks and strides, misled samples, ties, many tasks."""

from __future__ import annotations

from typing import Any

import emulated
import pytest
import torch
from torch import Tensor

import taskloom
from taskloom.reference.masked.magnitude import delta, descending_ranks, magnitude_bits

LARGE = 200_003
MEDIUM = 60_001
# Groups of 8 entries in the sample of a float32 vector.
SAMPLE_GROUPS = 4096


@pytest.fixture(scope="module")
def ops() -> Any:
    emulated.library()
    return torch.ops.taskloom_emulated


@pytest.fixture(scope="module")
def checks() -> Any:
    emulated.library()
    return torch.ops.taskloom_magnitude_checks


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bits_of(tuned: Tensor, base: Tensor | None = None) -> Tensor:
    dtype = torch.float64 if torch.float64 in (tuned.dtype, None if base is None else base.dtype) else torch.float32
    return magnitude_bits(delta(tuned, base, dtype))


def inside(bits: Tensor, cuts: Tensor) -> Tensor:
    """The entries inside each of the cuts ``[..., 2]`` of magnitudes ``[..., n]``."""
    index = torch.arange(bits.shape[-1])
    threshold, tie_end = cuts[..., :1], cuts[..., 1:]
    return (bits > threshold) | ((bits == threshold) & (index < tie_end))


def check_rank(ops: Any, tuned: Tensor, base: Tensor | None, rank: int) -> None:
    """The mask and the threshold of one rank against a sort."""
    expected = (descending_ranks(bits_of(tuned, base).reshape(1, -1)) < rank).reshape(-1)
    mask = ops.magnitude_mask.default(tuned, base, 0, rank, False, None, None, False)
    assert torch.equal(mask.reshape(-1), expected), rank
    threshold, kept = ops.magnitude_threshold.default([tuned], [] if base is None else [base], [rank], False)
    bits = bits_of(tuned, base).reshape(-1)
    chosen = bits[expected].min()
    assert magnitude_bits(threshold).item() == chosen
    assert kept.item() == (bits[expected] == chosen).sum()
    given = ops.magnitude_mask.default(
        tuned, base, 0, 0, False, torch.cat([threshold, threshold]), torch.stack([kept[0] * 0, kept[0]]), True
    )
    above = bits > chosen
    expected_given = expected & ~above
    assert torch.equal(given, taskloom.pack_mask(expected_given))


@pytest.mark.parametrize(
    ("dtype", "base_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, None), (torch.float16, torch.float32), (torch.float64, torch.bfloat16)],
)
def test_large(ops: Any, dtype: torch.dtype, base_dtype: torch.dtype | None, order: str) -> None:
    tuned = random(LARGE, dtype=dtype)
    base = None if base_dtype is None else random(LARGE, seed=1, dtype=base_dtype)
    check_rank(ops, tuned, base, LARGE // 5)


@pytest.mark.parametrize("rank", [1, 40, MEDIUM // 2, MEDIUM - 1, MEDIUM])
def test_ranks_at_the_ends(ops: Any, rank: int) -> None:
    check_rank(ops, random(MEDIUM), None, rank)


@pytest.mark.parametrize("share", [0.05, 0.39, 0.4, 0.41, 0.9])
def test_few_distinct_magnitudes(ops: Any, share: float) -> None:
    """Ties over many chunks: at the bracket's ends, and far more than it has room for."""
    tuned = (random(MEDIUM) * 1.2).round()
    check_rank(ops, tuned, None, int(share * MEDIUM))


def test_mostly_zeros(ops: Any) -> None:
    tuned = torch.where(random(MEDIUM, seed=2) > 1, random(MEDIUM), 0.0)
    for rank in (MEDIUM // 10, MEDIUM // 3):
        check_rank(ops, tuned, None, rank)


def sampled_groups(groups: int) -> Tensor:
    """The groups that the sample draws: as the kernel's jitter says."""
    drawn = []
    for run in range(SAMPLE_GROUPS):
        value = ((run ^ (run >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        value = ((value ^ (value >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        begin, end = run * groups // SAMPLE_GROUPS, (run + 1) * groups // SAMPLE_GROUPS
        drawn.append(begin + (value ^ (value >> 16)) % (end - begin))
    return torch.tensor(drawn)


@pytest.mark.parametrize("low", [True, False])
def test_a_sample_that_misses(ops: Any, low: bool, order: str) -> None:
    """All that was not sampled lies on one side of the bracket."""
    groups = MEDIUM // 8 + 1
    values = torch.rand(groups, 8, generator=torch.Generator().manual_seed(3)) + (0 if low else 10)
    values[sampled_groups(groups)] = torch.rand(SAMPLE_GROUPS, 8, generator=torch.Generator().manual_seed(4)) + (10 if low else 0)
    check_rank(ops, values.reshape(-1)[:MEDIUM], None, MEDIUM // 2)


def test_more_between_than_there_is_room_for(ops: Any, order: str) -> None:
    groups = MEDIUM // 8 + 1
    values = 0.5 + 1e-4 * torch.rand(groups, 8, generator=torch.Generator().manual_seed(3))
    values[sampled_groups(groups)] = torch.rand(SAMPLE_GROUPS, 8, generator=torch.Generator().manual_seed(4))
    check_rank(ops, values.reshape(-1)[:MEDIUM], None, MEDIUM // 2)


def test_a_view_that_is_not_aligned(ops: Any) -> None:
    tuned, base = random(MEDIUM + 3)[3:], random(MEDIUM + 5, dtype=torch.bfloat16)[5:]
    check_rank(ops, tuned, base, MEDIUM // 3)


def test_many_ranks_at_once(ops: Any) -> None:
    values = random(MEDIUM, dtype=torch.bfloat16)
    ranks = [*range(0, MEDIUM, MEDIUM // 9), MEDIUM]
    for ours, theirs in zip(
        ops.magnitude_threshold.default([values], [], ranks, False),
        torch.ops.taskloom.magnitude_threshold.default([values], [], ranks, False),
        strict=True,
    ):
        assert torch.equal(ours.nan_to_num(-1), theirs.nan_to_num(-1))


def test_a_vector_of_many_tensors(ops: Any) -> None:
    parts = [
        random(1 + 37 * place % 900, seed=place, dtype=(torch.float32, torch.bfloat16)[place % 2])[place % 3 :] for place in range(100)
    ]
    parts += [torch.empty(0), random(60_001)]
    total = sum(part.numel() for part in parts)
    for ranks in ([0, total // 7, total], [total // 2]):
        ours = ops.magnitude_threshold.default(parts, [], ranks, False)
        theirs = torch.ops.taskloom.magnitude_threshold.default(parts, [], ranks, False)
        assert torch.equal(ours[0].nan_to_num(-1), theirs[0].nan_to_num(-1))
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize(("tasks", "numel"), [(100, 300), (3, 40_001)])
def test_cuts_of_many_deltas(checks: Any, tasks: int, numel: int) -> None:
    base = random(numel)
    tuned = [(random(numel, seed=task) * 4).round() for task in range(1, 1 + tasks)]
    # Most of many tasks look for nothing: nothing or all of them is inside.
    ranks = [rank for task in range(tasks) for rank in ((0, numel) if task % 4 else (numel // 9, numel - task * numel // (2 * tasks)))]
    cuts = checks.cuts.default(tuned, base, ranks, False)
    assert cuts.shape == (tasks, 2, 2)
    bits = torch.stack([bits_of(one, base) for one in tuned])
    descending = descending_ranks(bits)
    for place in range(2):
        assert torch.equal(inside(bits, cuts[:, place]), descending < torch.tensor(ranks[place::2])[:, None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("length", [1, 7, 255, 256, 257, 1000, 1025, 4100, 8193, 33_003])
def test_row_cuts(checks: Any, length: int, dtype: torch.dtype) -> None:
    """Each way in which rows are held, with ties and without, for two tasks."""
    rows = 3
    tuned = [random(rows, length, seed=1, dtype=dtype), (random(rows, length, seed=2) * 3).round()]
    ranks = [0, length // 3, length, length // 2]
    cuts = checks.cuts.default(tuned, None, ranks, True)
    assert cuts.shape == (2, rows, 2, 2)
    for task, one in enumerate(tuned):
        bits = magnitude_bits(one.to(torch.float64 if dtype == torch.float64 else torch.float32))
        for place in range(2):
            expected = descending_ranks(bits) < ranks[2 * task + place]
            assert torch.equal(inside(bits, cuts[task, :, place]), expected)


def test_histogram_outside_the_window(ops: Any) -> None:
    """Zeros, subnormals, huge values, infinities and NaN, which blocks do not count in shared memory."""
    values = random(20_011)
    for place, special in enumerate((0.0, -0.0, 1e-42, 3e38, torch.inf, torch.nan, 1e-30)):
        values[place::19] = special
    for dtype in (torch.float32, torch.float64):
        for base in (None, torch.zeros(20_011)):
            wide = dtype == torch.float64
            arguments = (values.to(dtype), base, 48 if wide else 16, 0, wide)
            assert torch.equal(ops.magnitude_histogram.default(*arguments), torch.ops.taskloom.magnitude_histogram.default(*arguments))


def test_errors_name_the_argument(ops: Any) -> None:
    values = torch.zeros(4)
    with pytest.raises(RuntimeError, match=r"rank: expected 0 <= rank <= 4, got 5"):
        ops.magnitude_threshold.default([values], [], [5], False)
    with pytest.raises(RuntimeError, match=r"base: expected 1 tensors, got 2"):
        ops.magnitude_threshold.default([values], [values, values], [1], False)
    with pytest.raises(RuntimeError, match=r"base: expected 4 entries as in tuned, got 3"):
        ops.magnitude_mask.default(values, torch.zeros(3), 0, 1, False, None, None, False)
    with pytest.raises(RuntimeError, match=r"rank: expected 0 <= rank_begin <= rank_end <= 4, got 3 and 2"):
        ops.magnitude_mask.default(values, None, 3, 2, False, None, None, False)
    with pytest.raises(RuntimeError, match=r"threshold, equal_kept: expected both or neither"):
        ops.magnitude_mask.default(values, None, 0, 0, False, torch.zeros(2), None, False)
    with pytest.raises(RuntimeError, match=r"shift: expected 0 or 16"):
        ops.magnitude_histogram.default(values, None, 32, 0, False)
    with pytest.raises(RuntimeError, match=r"wide: float64 tensors are compared in float64"):
        ops.magnitude_histogram.default(values.double(), None, 0, 0, False)

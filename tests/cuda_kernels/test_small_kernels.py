"""Kernels over lists of tensors and long ones: many tasks, many blocks, several pieces of work to a block of threads, odd addresses."""

from __future__ import annotations

from typing import Any

import emulated
import pytest
import torch
from contract import assert_close, assert_same_bits, copied
from samples import awkward, normal, random_packed, set_tail

import taskloom

LONG = 200_003


def _both(op: str, *arguments: Any) -> tuple[Any, Any]:
    """What the emulated kernel gives, and what the CPU's gives."""
    assert taskloom.ops is not None
    emulated.library()
    ours = getattr(torch.ops.taskloom_emulated, op).default(*copied(arguments))
    return ours, getattr(torch.ops.taskloom, op).default(*copied(arguments))


def _shifted(values: torch.Tensor, entries: int = 1) -> torch.Tensor:
    """The same values at an address that is no multiple of 16 bytes."""
    room = torch.empty(values.numel() + entries, dtype=values.dtype)
    return room[entries:].copy_(values.flatten()).view(values.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_hundred_tasks(dtype: torch.dtype) -> None:
    tuned = [_shifted(normal(1001, seed=seed, dtype=dtype), seed % 3) for seed in range(100)]
    weight = [0.01 * place for place in range(100)]
    ours, theirs = _both("multi_task_vector", normal(1001, dtype=dtype), tuned, weight)
    assert_same_bits(ours, theirs)


def test_special_values_of_a_long_tensor_round_as_on_the_cpu() -> None:
    base = torch.cat([awkward(torch.float16).repeat(300), normal(LONG - 3900, dtype=torch.float16)])
    tuned = [base.flip(0), normal(LONG, seed=2, dtype=torch.bfloat16), normal(LONG, seed=3)]
    ours, total = _both("multi_task_vector", base, tuned, [0.3, -1.0, 2.0])
    assert ours.isnan().equal(total.isnan())
    assert_same_bits(ours.nan_to_num(), total.nan_to_num())
    assert_same_bits(*_both("task_mask", base, tuned[0], total, 0.4))
    assert_same_bits(*_both("task_mask", _shifted(base), tuned[1], total, 0.0))


@pytest.mark.parametrize("tasks", [15, 16, 255, 256, 4095, 4096])
def test_counts_of_many_masks(tasks: int) -> None:
    masks = [random_packed(61, seed=seed % 37, density=seed % 5 / 4) for seed in range(tasks)]
    for k in (1, tasks // 2, tasks, 2 * tasks):
        for ours, theirs in zip(*_both("mask_count", masks, 61, k), strict=True):
            assert_same_bits(ours, theirs)


def test_counts_of_long_masks_at_odd_addresses(order: str) -> None:
    masks = [set_tail(_shifted(random_packed(LONG, seed=seed), seed), LONG) for seed in range(5)]
    for ours, theirs in zip(*_both("mask_count", masks, LONG, 2), strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("density", [0.02, 0.98])
def test_compress_and_restore_of_long_tensors(dtype: torch.dtype, density: float) -> None:
    values = _shifted((100 * normal(LONG)).to(dtype))
    packed = _shifted(set_tail(random_packed(LONG, density=density), LONG))
    compressed, theirs = _both("masked_compress", values, packed)
    assert_same_bits(compressed, theirs)
    restored, theirs = _both("masked_restore", _shifted(compressed), packed, _shifted(values.flip(0)))
    assert_same_bits(restored, theirs)


@pytest.mark.parametrize("length", [0, 2, 4])
def test_restore_refuses_another_length(length: int) -> None:
    emulated.library()
    packed = taskloom.pack_mask(torch.tensor([True, False, True, True]))
    with pytest.raises(RuntimeError, match="compressed: expected one element for each set entry"):
        torch.ops.taskloom_emulated.masked_restore(torch.zeros(length), packed, torch.zeros(4))


@pytest.mark.parametrize(
    ("target", "base", "delta"),
    [
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float16),
        (torch.float16, torch.float16, torch.float32),
        (torch.float64, torch.float16, torch.float32),
        (torch.bfloat16, torch.float64, torch.bfloat16),
    ],
)
def test_switches_of_unaligned_tensors(target: torch.dtype, base: torch.dtype, delta: torch.dtype) -> None:
    for numel, shift in ((4099, 1), (4096, 0)):
        origin = _shifted(torch.cat([awkward(base), normal(numel - 13, dtype=base)]), shift)
        changes = _shifted(normal(numel, seed=1, dtype=delta), shift)
        weights = _shifted(normal(numel, seed=2, dtype=target), shift)
        masks = [set_tail(random_packed(numel, seed=seed, density=0.5), numel) for seed in (3, 4)]
        ours, theirs = weights, weights.clone()
        torch.ops.taskloom_emulated.masked_switch_(ours, origin, changes, *masks)
        torch.ops.taskloom.masked_switch_(theirs, origin, changes, *masks)
        assert ours.isnan().equal(theirs.isnan())
        assert_same_bits(ours.nan_to_num(), theirs.nan_to_num())


def _blocks(seed: int, dtype: torch.dtype, sizes: list[int]) -> list[torch.Tensor]:
    return [_shifted(normal(size, seed=seed + place, dtype=dtype), place % 2) for place, size in enumerate(sizes)]


SIZES = [0, 1, 5, *range(20, 300, 39), 40_003, 0, 8, 0]


@pytest.mark.parametrize("groups", [0, 1, 3, 40])
def test_many_blocks_of_all_sizes(groups: int, order: str) -> None:
    base = _blocks(0, torch.bfloat16, SIZES)
    deltas = [delta for task in range(5) for delta in _blocks(100 * task + 100, (torch.float16, torch.float32)[task % 2], SIZES)]
    generator = torch.Generator().manual_seed(0)
    sampled = [torch.randint(0, max(groups, 1), (size,), generator=generator, dtype=torch.uint8) for size in SIZES]
    partition = [_shifted(part, place % 3) for place, part in enumerate(sampled)] if groups else []
    coef = normal(5, len(SIZES), max(groups, 1))
    for ours, theirs in zip(*_both("block_scale_merge", base, deltas, coef, partition), strict=True):
        assert_same_bits(ours, theirs)
    ours, theirs = _both("block_scale_merge_backward", base, deltas, partition, max(groups, 1))
    assert_close(ours, theirs)


@pytest.mark.parametrize("groups", [97, 200, 256])
def test_many_groups(groups: int) -> None:
    gradient, delta = normal(70_001), normal(70_001, seed=1, dtype=torch.bfloat16)
    partition = torch.randint(0, groups, (70_001,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    ours, theirs = _both("block_scale_merge_backward", [gradient], [delta], [partition], groups)
    assert_close(ours, theirs)
    assert_same_bits(ours, _both("block_scale_merge_backward", [gradient], [delta], [partition], groups)[0])


def test_blocks_of_float64_among_others() -> None:
    base = [normal(300), normal(300, dtype=torch.float64), normal(300)]
    deltas = [normal(300), normal(300), normal(300, dtype=torch.float64)]
    for coef in (normal(1, 3, 1), normal(1, 3, 1, dtype=torch.float64)):
        for ours, theirs in zip(*_both("block_scale_merge", base, deltas, coef, []), strict=True):
            assert_same_bits(ours, theirs)


@pytest.mark.parametrize("place", [0, 4095, 4999])
def test_a_group_that_is_none_is_an_error(place: int) -> None:
    emulated.library()
    partition = torch.zeros(5000, dtype=torch.uint8)
    partition[place] = 7
    tensors = ([torch.zeros(5000)], [torch.zeros(5000)])
    with pytest.raises(RuntimeError, match="partition: expected values below 3"):
        torch.ops.taskloom_emulated.block_scale_merge(*tensors, torch.zeros(1, 1, 3), [partition])
    with pytest.raises(RuntimeError, match="partition: expected values below 3"):
        torch.ops.taskloom_emulated.block_scale_merge_backward(*tensors, [partition], 3)

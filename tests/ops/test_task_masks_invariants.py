"""One task's weights from shared ones: what holds of task_mask, masked_update, mask_count and masked_switch_ together."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from contract import assert_same_bits
from samples import moved, weights

import taskloom

SHAPE = (41, 23)  # not a multiple of 8
NUMEL = SHAPE[0] * SHAPE[1]


def _tasks(count: int, dtype: torch.dtype = torch.float32, density: float = 0.6) -> tuple[torch.Tensor, list[torch.Tensor]]:
    base = weights(*SHAPE, dtype=dtype)
    return base, [moved(base, seed, density) for seed in range(1, count + 1)]


def _exact(count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Weights on a grid of 2^-10, so that differences and sums are exact in float32."""
    base, tasks = _tasks(count)
    return (base * 1024).round() / 1024, [(one * 1024).round() / 1024 for one in tasks]


def test_one_task_is_restored() -> None:
    base, (tuned,) = _exact(1)
    total = taskloom.multi_task_vector(base, [tuned])
    packed = taskloom.task_mask(base, tuned, total)
    assert torch.equal(taskloom.unpack_mask(packed, SHAPE), total != 0)
    assert_same_bits(taskloom.masked_update(base, packed, total), tuned)


def test_one_task_is_restored_within_an_ulp() -> None:
    base, (tuned,) = _tasks(1)
    total = taskloom.multi_task_vector(base, [tuned])
    restored = taskloom.masked_update(base, taskloom.task_mask(base, tuned, total), total)
    largest = torch.maximum(base.abs(), tuned.abs())
    assert ((restored - tuned).abs() <= torch.nextafter(largest, 2 * largest) - largest).all()


@pytest.mark.parametrize("tall_mask_lambda", [0.01, 0.4, 1.0, 100.0])
def test_disjoint_tasks_are_restored(tall_mask_lambda: float) -> None:
    base, tasks = _exact(4)
    owner = torch.randint(0, 5, SHAPE, generator=torch.Generator().manual_seed(7))
    tasks = [torch.where(owner == task, tuned, base) for task, tuned in enumerate(tasks)]
    total = taskloom.multi_task_vector(base, tasks)
    for tuned in tasks:
        packed = taskloom.task_mask(base, tuned, total, tall_mask_lambda)
        assert torch.equal(taskloom.unpack_mask(packed, SHAPE), tuned != base)
        assert_same_bits(taskloom.masked_update(base, packed, total), tuned)


def test_lambda_one_minimises_the_distance() -> None:
    base, tasks = _exact(4)
    total = taskloom.multi_task_vector(base, tasks)
    for task, tuned in enumerate(tasks):
        delta = (tuned - base).double()

        def distance(mask: torch.Tensor, tuned: torch.Tensor = tuned) -> float:
            return float((taskloom.masked_update(base, mask, total) - tuned).double().abs().sum())

        best = distance(taskloom.task_mask(base, tuned, total, 1.0))
        optimum = float(torch.minimum(delta.abs(), (total - delta).abs()).sum())
        assert best == pytest.approx(optimum, rel=1e-6)
        for seed in range(20):
            random = torch.rand(SHAPE, generator=torch.Generator().manual_seed(100 * task + seed)) < seed / 19
            assert best <= distance(random)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_shrink_as_lambda_grows(dtype: torch.dtype) -> None:
    base, tasks = _tasks(5, dtype)
    total = taskloom.multi_task_vector(base, tasks)
    for tuned in tasks:
        masks = [taskloom.task_mask(base, tuned, total, value) for value in (0.1, 0.2, 0.4, 0.6, 1.0, 2.0, 9.0)]
        for wider, narrower in pairwise(masks):
            assert not (narrower & ~wider).any()


def test_consensus() -> None:
    base, tasks = _tasks(6)
    total = taskloom.multi_task_vector(base, tasks)
    masks = [taskloom.task_mask(base, tuned, total) for tuned in tasks]
    union, common = masks[0], masks[0]
    for mask in masks[1:]:
        union, common = union | mask, common & mask
    selected = [taskloom.mask_count(masks, NUMEL, k)[0] for k in range(8)]
    assert_same_bits(selected[0], taskloom.pack_mask(torch.ones(SHAPE, dtype=torch.bool)))
    assert_same_bits(selected[1], union)
    assert_same_bits(selected[6], common)
    assert_same_bits(taskloom.masked_update(base, selected[7], total, 0.3), base)
    assert_same_bits(taskloom.masked_update(base, selected[0], total), base + total)
    assert int(taskloom.mask_count(masks, NUMEL, 2)[1].sum()) == NUMEL


def test_bits_are_numpys() -> None:
    base, tasks = _tasks(2)
    packed = taskloom.task_mask(base, tasks[0], taskloom.multi_task_vector(base, tasks))
    mask = taskloom.unpack_mask(packed, SHAPE)
    assert np.array_equal(np.unpackbits(packed.numpy(), bitorder="little")[:NUMEL], mask.numpy().reshape(-1))
    assert torch.equal(taskloom.pack_mask(mask), packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_and_weights_are_the_plain_formulas(dtype: torch.dtype) -> None:
    base, tasks = _tasks(3, dtype)
    deltas = [one.float() - base.float() for one in tasks]
    total = taskloom.multi_task_vector(base, tasks)
    assert_same_bits(total, deltas[0] + deltas[1] + deltas[2] + 0.0)
    for tuned, delta in zip(tasks, deltas, strict=True):
        mask = delta.abs() > 0.4 * (total - delta).abs()
        packed = taskloom.task_mask(base, tuned, total)
        assert_same_bits(packed, taskloom.pack_mask(mask))
        assert_same_bits(taskloom.masked_update(base.float(), packed, total), torch.where(mask, base.float() + total, base.float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switching_does_not_drift(dtype: torch.dtype) -> None:
    base, tasks = _tasks(4, dtype)
    total = taskloom.multi_task_vector(base, tasks)
    masks = [taskloom.task_mask(base, tuned, total) for tuned in tasks]
    restored = [taskloom.masked_update(base, mask, total) for mask in masks]
    live, held = restored[0].clone(), 0
    for task in (1, 2, 3, 0, 2, 1, 0):
        taskloom.masked_switch_(live, base, total, masks[held], masks[task])
        held = task
        assert_same_bits(live, restored[task])

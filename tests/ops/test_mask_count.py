"""mask_count beyond its contract: properties, errors, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled import compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import random_packed

import taskloom


@settings(max_examples=60, deadline=None)
@given(tasks=st.integers(1, 40), numel=st.integers(0, 9000), density=st.floats(0, 1), seed=st.integers(0, 100), data=st.data())
def test_counts_what_unpacking_counts(tasks: int, numel: int, density: float, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, tasks + 1))
    masks = [random_packed(numel, seed=seed + task, density=density) for task in range(tasks)]
    counts = torch.stack([taskloom.unpack_mask(mask, (numel,)) for mask in masks]).sum(0)
    selected, histogram = taskloom.mask_count(masks, numel, k)
    assert torch.equal(selected, taskloom.pack_mask(counts >= k))
    assert histogram.tolist() == torch.bincount(counts, minlength=tasks + 1).tolist()
    assert int(histogram.sum()) == numel


@pytest.mark.parametrize("tasks", [1, 3, 8, 16])
def test_extreme_counts(tasks: int) -> None:
    numel = 4099
    masks = torch.stack([random_packed(numel, seed=task, density=0.8) for task in range(tasks)])
    union, common = masks[0], masks[0]
    for mask in masks[1:]:
        union, common = union | mask, common & mask
    ones = taskloom.pack_mask(torch.ones(numel, dtype=torch.bool))
    assert torch.equal(taskloom.mask_count(masks, numel, 0)[0], ones)
    assert torch.equal(taskloom.mask_count(masks, numel, 1)[0], union)
    assert torch.equal(taskloom.mask_count(masks, numel, tasks)[0], common)
    assert not taskloom.mask_count(masks, numel, tasks + 1)[0].any()
    assert not taskloom.mask_count(masks, numel, 1 << 40)[0].any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], 3, 1), ValueError, "packed: expected at least one mask"),
        ((torch.zeros(1, dtype=torch.uint8), 3, 1), ValueError, "packed: expected two dimensions or a sequence of masks, got 1"),
        ((torch.zeros(2, 1, dtype=torch.uint8), 9, 1), ValueError, r"packed\[0\]: expected shape \(2,\)"),
        ((torch.zeros(2, 1, dtype=torch.int8), 3, 1), TypeError, r"packed\[0\]: expected torch.uint8"),
        ((torch.zeros(2, 1, dtype=torch.uint8), -1, 1), ValueError, "numel: must not be negative, got -1"),
        ((torch.zeros(2, 1, dtype=torch.uint8), 3, -1), ValueError, "k: must not be negative, got -1"),
        ((torch.zeros(2, 1, dtype=torch.uint8), 3, 1.0), TypeError, "k: expected an int, got float"),
    ],
)
def test_errors(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        taskloom.mask_count(*arguments)


def test_compiled() -> None:
    def count(masks: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return taskloom.mask_count(masks, values.numel(), 2)

    run = compiled(count)
    for size in (17, 41):
        masks, values = torch.stack([random_packed(size, seed=seed) for seed in range(3)]), torch.empty(size)
        for got, expected in zip(run(masks, values), count(masks, values), strict=True):
            assert torch.equal(got, expected)

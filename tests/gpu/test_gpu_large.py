"""Indices beyond 31 bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from on_gpu import require, require_memory

import taskloom

pytestmark = pytest.mark.gpu

ENTRIES = (1 << 31) + 1031
LAST = 2000


@pytest.fixture(autouse=True)
def quick_memory(poisoned_memory: None) -> Iterator[None]:
    """Filling gigabytes anew for every tensor would take longer than the ops."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.cuda.empty_cache()


def _flags() -> torch.Tensor:
    return torch.rand(LAST, generator=torch.Generator().manual_seed(1)) < 0.3


def test_masks_are_packed_and_unpacked(gpu_backend: str) -> None:
    require("pack_mask", gpu_backend)
    require_memory(6)
    mask = torch.zeros(ENTRIES, dtype=torch.bool, device="cuda")
    mask[-LAST:] = _flags().cuda()
    packed = taskloom.pack_mask(mask)
    assert int(packed[: (ENTRIES - LAST) // 8].count_nonzero()) == 0
    assert taskloom.unpack_mask(packed, (ENTRIES,)).equal(mask)


def test_entries_are_updated_in_place(gpu_backend: str) -> None:
    require("masked_update_", gpu_backend)
    require_memory(14)
    target, delta = (torch.full((ENTRIES,), value, dtype=torch.bfloat16, device="cuda") for value in (1.0, 2.0))
    mask = torch.zeros(ENTRIES, dtype=torch.bool, device="cuda")
    mask[-LAST:] = _flags().cuda()
    taskloom.masked_update_(target, mask, delta)
    assert target[-LAST:].cpu().equal(torch.where(_flags(), 3.0, 1.0).bfloat16())
    assert bool((target[:-LAST] == 1).all())


def test_the_largest_magnitudes_lie_at_the_end(gpu_backend: str) -> None:
    require("magnitude_threshold", gpu_backend)
    require_memory(14)
    values = torch.ones(ENTRIES, dtype=torch.bfloat16, device="cuda")
    values[-LAST:] = torch.arange(LAST, 0, -1, device="cuda").float().add(2).bfloat16()
    found = taskloom.magnitude_threshold(values, rank=LAST + 5)
    assert (float(found.threshold), int(found.equal_kept)) == (1.0, 5)
    largest = taskloom.magnitude_threshold(values, rank=1)
    assert float(largest.threshold) == float(values.max())


def test_tensors_are_merged(gpu_backend: str) -> None:
    require("sparse_merge", gpu_backend)
    require_memory(18)
    base = torch.zeros(ENTRIES, dtype=torch.bfloat16, device="cuda")
    tuned = base.clone()
    tuned[-LAST:] = _flags().cuda().bfloat16()
    merged = taskloom.sparse_merge(base, [tuned, tuned], 0.5)
    assert merged[-LAST:].cpu().equal(_flags().bfloat16())
    assert int(merged[:-LAST].count_nonzero()) == 0


def test_random_words_depend_on_the_entry_alone(gpu_backend: str) -> None:
    require("sparse_merge", gpu_backend)
    require_memory(10)
    tuned = torch.ones(ENTRIES, dtype=torch.bfloat16, device="cuda")
    kept = taskloom.sparse_merge(None, [tuned], select="dropout", density=0.5, seed=3)
    share = float(kept[-(1 << 20) :].float().mean())
    assert 0.49 < share < 0.51
    assert not kept[-LAST:].equal(kept[:LAST])

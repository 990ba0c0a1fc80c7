"""How many entries are set before each word of a mask, for lists of masks."""

from __future__ import annotations

import emulated
import pytest
import torch
from samples import random_packed, set_tail

TILE, CHUNK = 1024, 65536


def _expected(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Set entries before each word and the words of a whole number of tiles, and the total."""
    padded = torch.nn.functional.pad(mask.long(), (0, -len(mask) % TILE))
    before = padded.cumsum(0) - padded
    return before[::32], (padded.view(-1, 32) << torch.arange(32)).sum(1), int(padded.sum())


def _check(masks: list[torch.Tensor], packed: list[torch.Tensor]) -> None:
    emulated.library()
    before, bits, totals = torch.ops.taskloom_mask_ranks_checks.mask_ranks(packed, [len(mask) for mask in masks])
    expected = [_expected(mask) for mask in masks]
    assert before.equal(torch.cat([one[0] for one in expected]))
    assert bits.equal(torch.cat([one[1] for one in expected]))
    assert totals.tolist() == [one[2] for one in expected]


def _bools(packed: torch.Tensor, numel: int) -> torch.Tensor:
    return (packed[:, None] >> torch.arange(8) & 1).bool().view(-1)[:numel]


@pytest.mark.parametrize("numel", [0, 1, 31, 1024, 1025, CHUNK, CHUNK + 33])
def test_one_mask(numel: int, order: str) -> None:
    packed = set_tail(random_packed(numel), numel)
    _check([_bools(packed, numel)], [packed])


def test_many_masks(order: str) -> None:
    sizes = [*range(0, 300, 7), 0, 5000, CHUNK + 1, 0, 3 * CHUNK - 5, 1, 0]
    packed = [set_tail(random_packed(numel, seed=seed, density=seed % 4 / 3), numel) for seed, numel in enumerate(sizes)]
    _check([_bools(one, numel) for one, numel in zip(packed, sizes, strict=True)], packed)


def test_masks_at_odd_addresses(order: str) -> None:
    sizes = [4000, 2048, 100]
    packed = [random_packed(numel + 24)[3 - place :][: (numel + 7) // 8] for place, numel in enumerate(sizes)]
    _check([_bools(one, numel) for one, numel in zip(packed, sizes, strict=True)], packed)


def test_more_chunks_than_a_block_sums_at_once() -> None:
    numel = 1030 * CHUNK + 5
    packed = torch.zeros((numel + 7) // 8, dtype=torch.uint8)
    packed[:: CHUNK // 8] = 7
    emulated.library()
    before, totals = torch.ops.taskloom_mask_ranks_checks.chunk_ranks(packed, numel)
    assert before.equal(3 * torch.arange(1031))
    assert totals.tolist() == [3 * 1031]

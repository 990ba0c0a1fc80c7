"""The emulator itself: barriers, warps and shared memory do what CUDA says, and the defects that it is there to find are found."""

from __future__ import annotations

from typing import Any

import emulated
import pytest
import torch


@pytest.fixture(scope="module")
def checks() -> Any:
    emulated.library()
    return torch.ops.taskloom_emulator_checks


@pytest.mark.parametrize("numel", [1, 255, 256, 1000])
def test_shuffles_shared_memory_and_barriers(checks: Any, numel: int, order: str) -> None:
    values = torch.arange(numel) ** 2
    blocks = [part.sum().item() for part in values.split(256)]
    assert checks.block_sums(values).tolist() == blocks


def test_collectives(checks: Any, order: str) -> None:
    out = torch.zeros(256, 8, dtype=torch.int64)
    checks.run_kernel(out, 3)
    for thread in range(256):
        lane = thread % 32
        ballot = sum(1 << other for other in range(0, 32, 3))
        matches = 0xF << (lane // 4 * 4)
        assert out[thread].tolist() == [ballot, matches, lane ^ 5, lane - 3 if lane >= 3 else lane, 7, 496, 52, 37]


def test_a_thread_that_is_waited_for_in_vain_is_an_error(checks: Any, order: str) -> None:
    with pytest.raises(RuntimeError, match="wait for each other"):
        checks.run_kernel(torch.zeros(1, dtype=torch.int64), 0)
    assert checks.block_sums(torch.ones(4, dtype=torch.int64)).tolist() == [4]


def test_shared_memory_is_poisoned(checks: Any) -> None:
    out = torch.zeros(2, dtype=torch.int64)
    checks.run_kernel(out, 1)
    assert out.tolist() == [-1, -1]


def test_a_missing_barrier_shows_in_another_order(checks: Any) -> None:
    seen = []
    for order in emulated.ORDERS:
        emulated.set_order(order)
        out = torch.zeros(256, dtype=torch.int64)
        checks.run_kernel(out, 2)
        seen.append(tuple(out.tolist()))
    emulated.set_order("forward")
    assert len(set(seen)) == 3


def test_blocks_are_whole_warps(checks: Any) -> None:
    with pytest.raises(RuntimeError, match="whole warps"):
        checks.run_kernel(torch.zeros(256, dtype=torch.int64), 4)


@pytest.mark.parametrize("rows", [0, 1, 384, 385, 2000])
def test_tables_arrive_whole(checks: Any, rows: int) -> None:
    table = checks.table_of(torch.zeros(1), rows)
    assert table.view(torch.int64).tolist() == [3 * row for row in range(rows)]

"""The rows of bench_calls: every op is among them, and a row measures the op that it names."""

from __future__ import annotations

import pytest
import torch

import bench_calls
from call_rows import CallRow, rows
from taskloom.ops._backends import OPS

ROWS = rows()


def test_every_op_has_a_row() -> None:
    assert {row.op for row in ROWS} >= set(OPS)


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.op} {row.use}" for row in ROWS])
def test_a_row_runs_and_its_native_call_is_the_same(row: CallRow) -> None:
    row.peer()
    ours = row.ours()
    if row.native is not None and row.op not in ("masked_update_", "masked_switch_", "masked_adamw_", "masked_sgd_"):
        native = row.native()
        for one, other in zip(*(torch.utils._pytree.tree_leaves(result) for result in (ours, native)), strict=True):
            assert one.flatten().equal(other.flatten())
    found = bench_calls.measure(row, rounds=1, calls=1)
    assert found["over_peer"]["median"] > 0

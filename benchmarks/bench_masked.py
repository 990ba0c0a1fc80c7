"""Speed of the masked family beside torch eager: one row per op and use, in the ``rows_*.py`` by idea.

docs/benchmarks.md says how the comparison is made and what every column means.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import rows_block_scale
import rows_magnitude
import rows_masked_step
import rows_sparse_merge
import rows_task_masks
import rows_weighted_ce
from harness import Row

_TABLES = (rows_magnitude, rows_sparse_merge, rows_task_masks, rows_block_scale, rows_masked_step, rows_weighted_ce)
ROWS = tuple(row for table in _TABLES for row in table.ROWS)


@pytest.mark.parametrize(
    ("row", "dtype"),
    [pytest.param(row, dtype, id=f"{row.name}, {str(dtype).removeprefix('torch.')}") for row in ROWS for dtype in row.dtypes],
)
def test_speed(run_row: Callable[[Row, torch.dtype], None], row: Row, dtype: torch.dtype) -> None:
    run_row(row, dtype)

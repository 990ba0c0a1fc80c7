"""Speed of the gating family beside torch eager: one row per op and use, in the ``rows_*.py`` by idea.

docs/benchmarks.md says how the comparison is made and what every column means.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import rows_batch_norm_silu
import rows_experts
import rows_lora_feature_gate
import rows_manifold_loss
import rows_multi_gate
import rows_stream_softmax_mix
import rows_topk_gate
from harness import Row

ROWS: tuple[Row, ...] = (
    *rows_topk_gate.ROWS,
    *rows_experts.ROWS,
    *rows_manifold_loss.ROWS,
    *rows_multi_gate.ROWS,
    *rows_lora_feature_gate.ROWS,
    *rows_batch_norm_silu.ROWS,
    *rows_stream_softmax_mix.ROWS,
)


@pytest.mark.parametrize(
    ("row", "dtype"),
    [pytest.param(row, dtype, id=f"{row.name}, {str(dtype).removeprefix('torch.')}") for row in ROWS for dtype in row.dtypes],
)
def test_speed(run_row: Callable[[Row, torch.dtype], None], row: Row, dtype: torch.dtype) -> None:
    run_row(row, dtype)

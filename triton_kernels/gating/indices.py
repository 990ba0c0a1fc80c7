"""Indices that kernels of the family read: what is wrong with one, and how rows are parted among programs."""

from __future__ import annotations

import triton
from torch import Tensor

from taskloom.ops.gating._indices import assert_values, check_values
from taskloom.triton_kernels.launch import INTERPRETED


def check_indices(op: str, name: str, indices: Tensor, least: int, count: int, of: str) -> None:
    """An index out of range is a device-side assertion; in the interpreter a ValueError."""
    (check_values if indices.is_cpu else assert_values)(op, name, indices, least, count, of)


def row_blocks(width: int) -> dict[str, int]:
    """Rows and entries of each that a program takes at once."""
    entries = 1 << 14 if INTERPRETED else 1024
    block = min(entries, triton.next_power_of_2(max(width, 1)))
    return {"ROWS": entries // block, "BLOCK": block}

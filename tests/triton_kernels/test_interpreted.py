"""The kernels in Triton's interpreter, on the CPU: the whole contract of the ops, and what is particular to these kernels."""

from __future__ import annotations

import pytest
from processes import run_checks


@pytest.mark.long
def test_interpreted() -> None:
    run_checks("interpreted", TRITON_INTERPRET="1")


@pytest.mark.slow
def test_interpreted_sweep() -> None:
    run_checks("interpreted", "-m", "slow", TRITON_INTERPRET="1")

"""The kernels compiled for GPUs, without one."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run_checks


@pytest.mark.long
def test_each_kernel_compiles(tmp_path: Path) -> None:
    run_checks("ahead_of_time", TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.slow
def test_each_variant_compiles_for_each_target(tmp_path: Path) -> None:
    run_checks("ahead_of_time", "-m", "slow", TRITON_CACHE_DIR=str(tmp_path))

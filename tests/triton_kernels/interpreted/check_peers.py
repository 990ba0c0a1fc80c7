"""What benchmarks compare with in Triton computes what it is said to."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from contract import assert_close
from samples import normal


@pytest.fixture
def shrink_expand(monkeypatch: pytest.MonkeyPatch) -> object:
    folder = Path(__file__).parents[3] / "benchmarks" / "gpu_check"
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    return importlib.import_module("shrink_expand").shrink_expand


def test_rows_go_down_and_up_by_their_own_adapter(shrink_expand: object) -> None:
    assert callable(shrink_expand)
    x, A, B = normal(5, 2100), normal(3, 16, 2100, seed=1), normal(3, 130, 16, seed=2)
    task = torch.tensor([2, 0, 1, 2, 2])
    expected = torch.bmm(B[task].double(), torch.bmm(A[task].double(), x.double()[:, :, None]))[:, :, 0]
    assert_close(shrink_expand(x, A, B, task), expected.float())

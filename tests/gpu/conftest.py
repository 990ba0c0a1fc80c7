"""What the tests that need a GPU share. Where there is none each of them is skipped, and says so."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import taskloom

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))


@pytest.fixture(autouse=True)
def gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")


@pytest.fixture(autouse=True)
def _poisoned(gpu: None, poisoned_memory: None) -> None:
    """Every test here, once it is known that it runs."""


@pytest.fixture(params=["native", "triton"])
def gpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend of a GPU in turn."""
    with taskloom.backend(request.param):
        yield request.param

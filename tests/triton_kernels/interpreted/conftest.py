from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import taskloom

sys.path.insert(0, str(Path(__file__).parents[2] / "ops"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN (integers their largest value), so unwritten elements show."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def triton_backend() -> Iterator[None]:
    with taskloom.backend("triton"):
        yield

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import emulated
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN (integers their largest value), also those that the kernels allocate, so unwritten elements show."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=[name if name == "shuffled" else pytest.param(name, marks=pytest.mark.slow) for name in emulated.ORDERS])
def order(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test in shuffled order, and among the slow tests once for each other order in which blocks and threads may run."""
    emulated.set_order(request.param)
    yield request.param
    emulated.set_order("forward")

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import emulated
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """Every test here."""


@pytest.fixture(params=[name if name == "shuffled" else pytest.param(name, marks=pytest.mark.slow) for name in emulated.ORDERS])
def order(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test in shuffled order, and among the slow tests once for each other order in which blocks and threads may run."""
    emulated.set_order(request.param)
    yield request.param
    emulated.set_order("forward")

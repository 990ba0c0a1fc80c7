from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import taskloom

sys.path.insert(0, str(Path(__file__).parents[2] / "ops"))


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """Every test here."""


@pytest.fixture
def triton_backend() -> Iterator[None]:
    with taskloom.backend("triton"):
        yield

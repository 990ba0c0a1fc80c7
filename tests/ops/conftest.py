from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from taskloom.ops import _library


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory: None) -> None:
    """Every test here."""


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def restored_level() -> Iterator[None]:
    yield
    _library.force_cpu_level("")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()

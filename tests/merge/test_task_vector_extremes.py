"""Task vectors of float64's largest numbers."""

from __future__ import annotations

import math

import pytest
import torch

from taskloom import TaskVector


def test_a_cosine_is_not_made_of_infinities() -> None:
    large = TaskVector.from_deltas({"weight": torch.tensor([1e200, -1e200], dtype=torch.float64)})
    assert large.norm() == math.inf
    with pytest.raises(ValueError, match="cosine: the square of a norm overflows float64"):
        large.cosine(-large)
    assert (large / 1e100).cosine(-large / 1e100) == pytest.approx(-1)

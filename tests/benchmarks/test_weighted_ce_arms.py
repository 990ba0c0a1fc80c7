"""The benchmark of weighted_ce: what it compares gives the same results, and says why it cannot run."""

from __future__ import annotations

import pytest
import torch

from arms_weighted_ce import ARMS, Batch, batch, obstacle
from bench_weighted_ce import gate, peak_here


@pytest.fixture
def data() -> Batch:
    return batch(40, 16, 70, 0.3, torch.float32)


@pytest.mark.parametrize("arm", [arm for arm in ARMS if "compiled" not in arm and obstacle(arm, "cpu") is None])
def test_arms_agree(arm: str, data: Batch) -> None:
    gate([arm], data)


def test_a_wrong_arm_is_not_measured(data: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARMS, "wrong", lambda given: 1.001 * ARMS["ours"](given))
    with pytest.raises(AssertionError, match="wrong: loss: relative error"):
        gate(["wrong"], data)


def test_an_arm_that_cannot_run_says_why() -> None:
    assert obstacle("liger", "cpu") == "Liger's kernels need a GPU"


def test_the_peak_is_that_of_the_call() -> None:
    # Large beside what the rest of a long test process gives back or takes meanwhile.
    held = peak_here(lambda: torch.ones(1 << 26).sum(), compiles=False)
    assert 0.9 * (4 << 26) < held < 1.2 * (4 << 26)

"""The benchmark of a linearised model's linear layers: its ways give the same gradients, and a wrong one is not timed."""

from __future__ import annotations

import pytest
import torch

import bench_tangent_linear
from bench_tangent_linear import WAYS, Stack, gate, run


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layers", [1, 3])
def test_ways_give_the_gradients_of_jvp(way: str, layers: int) -> None:
    gate(Stack.of(5, 7, layers, torch.float64, "cpu"), way, 1e-12)


def test_rows_have_every_way() -> None:
    (row,) = run([(5, 7, 2)], "float32", "cpu", 2)
    assert all(row[f"jvp_over_{way}"]["median"] > 0 for way in (*WAYS, "ordinary"))


def test_a_wrong_way_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_tangent_linear.Stack, "stacked", lambda stack: [2 * one for one in stack.jvp()])
    with pytest.raises(AssertionError, match="stacked: relative error"):
        run([(5, 7, 2)], "float32", "cpu", 1)

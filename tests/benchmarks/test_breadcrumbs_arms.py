"""The arms of bench_breadcrumbs.py: ours is gated by a stable sort, and every arm has figures."""

from __future__ import annotations

import pytest
import torch

from bench_breadcrumbs import ARMS, DTYPES, OURS, gate, times
from inputs import checkpoints


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gate_passes(dtype: torch.dtype) -> None:
    gate(checkpoints((32, 64), dtype, 3))


def test_the_gate_fails_for_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(models: tuple[torch.Tensor, list[torch.Tensor]]) -> torch.Tensor:
        merged = ARMS["topk"](models)
        merged[0, 0] += 1e-3
        return merged

    monkeypatch.setitem(ARMS, OURS, wrong)
    with pytest.raises(AssertionError, match="1 of 2048 values differ"):
        gate(checkpoints((32, 64), torch.float32, 3))


def test_every_arm_has_figures() -> None:
    found = times(checkpoints((8, 64), torch.float32, 2), rounds=2)
    assert set(found["seconds"]) == set(ARMS)
    assert set(found["over_ours"]) == set(ARMS) - {OURS}
    assert found["bytes"] == 4 * 8 * 64 * 4

"""The arms of bench_routed_dit.py: the routed block is gated by the masked one, and memory is counted."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

import pytest

from bench_routed_dit import ARMS, Case, gate, kept_bytes, measure


def _case(beta: float, dtype: str = "float32") -> Case:
    return Case.make(Namespace(model="S", beta=beta, batch=2, tokens=6, dtype=dtype, device="cpu"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("beta", [0.4, 0.8])
def test_gate_passes(beta: float, dtype: str) -> None:
    gate(_case(beta, dtype))


def test_gate_fails_for_another_mask() -> None:
    case = _case(0.4)
    with pytest.raises(AssertionError, match="relative error"):
        gate(replace(case, mask=1 - case.mask))


def test_figures_of_every_arm() -> None:
    case = _case(0.8)
    kept = {arm: kept_bytes(case, arm) for arm in ARMS}
    assert 0 < kept["routed"] < kept["masked"]
    found = measure(case, backward=True, rounds=1)
    assert found["over_plain"]["plain"]["median"] == 1
    assert found["seconds"].keys() == ARMS.keys()

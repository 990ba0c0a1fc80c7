"""The arms of bench_expert_mlp.py: ours is gated by transformers' loop, and every arm has figures."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from bench_expert_mlp import OURS, Case, gate, measure

pytest.importorskip("transformers", minversion="5.0")


def _case(dtype: str = "float32") -> Case:
    return Case.make(Namespace(dim=32, hidden=16, experts=6, k=2, tokens=9, dtype=dtype, device="cpu"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gate_passes(dtype: str) -> None:
    gate(_case(dtype))


def test_gate_fails_for_other_weights() -> None:
    case = _case()
    layer = case.arms[OURS]
    with torch.no_grad():
        layer.down_proj = torch.nn.Parameter(layer.get_parameter("down_proj") * 1.001)
    with pytest.raises(AssertionError, match="relative error"):
        gate(case)


def test_figures_of_every_arm() -> None:
    case = _case()
    found = measure(case, backward=True, rounds=1)
    assert found["over_ours"][OURS]["median"] == 1
    assert found["seconds"].keys() == case.arms.keys()

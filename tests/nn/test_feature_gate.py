"""FeatureGate: the formula, the identity it starts as, errors."""

from __future__ import annotations

import pytest
import torch

from taskloom.nn import FeatureGate
from taskloom.nn.feature_gate import _shares


@pytest.mark.parametrize("maps", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_starts_as_the_identity(maps: int, dtype: torch.dtype) -> None:
    gate = FeatureGate(37, 5, maps, dtype=dtype)
    x = 3 * torch.randn(200, 37, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(gate(x), x)


def test_is_the_formula() -> None:
    gate = FeatureGate(11, 3, 2, dtype=torch.float64)
    torch.nn.init.normal_(gate.up)
    x = torch.randn(4, 5, 11, dtype=torch.float64)
    shares = torch.softmax(x @ gate.mix.weight.T, -1)
    factor = sum(shares[..., place, None] * 2 * torch.sigmoid(x @ gate.down[place] @ gate.up[place]) for place in range(2))
    torch.testing.assert_close(gate(x), x * factor, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(gate(x).square().sum(), list(gate.parameters()))
    expected = torch.autograd.grad((x * factor).square().sum(), list(gate.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_gate_is_between_0_and_2() -> None:
    gate = FeatureGate(16, 4, 2)
    torch.nn.init.normal_(gate.up, std=20.0)
    x = 5 * torch.randn(64, 16)
    factor = gate(x) / x
    assert bool(((factor >= 0) & (factor <= 2.0001)).all())
    assert factor.min() < 0.1
    assert factor.max() > 1.9


@pytest.mark.parametrize("maps", [2, 3, 4, 8])
def test_shares_are_positive_and_make_exactly_1(maps: int) -> None:
    logits = 4 * torch.randn(20000, maps, generator=torch.Generator().manual_seed(0))
    logits[:, -1] -= 20  # so that rounding is most of the last share
    shares = _shares(logits)
    assert bool((shares >= 0).all())
    assert bool((sum(shares.unbind(-1)) == 1).all())
    torch.testing.assert_close(shares, logits.softmax(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["dim", "rank", "n_lora"])
def test_sizes_below_1(name: str) -> None:
    with pytest.raises(ValueError, match=f"FeatureGate: {name}: expected at least 1, got 0"):
        FeatureGate(**({"dim": 8, "rank": 2, "n_lora": 2} | {name: 0}))


def test_other_features() -> None:
    with pytest.raises(ValueError, match=r"FeatureGate: x: expected 8 features, got shape \(3, 7\)"):
        FeatureGate(8, 2)(torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"FeatureGate: x: expected 8 features, got shape \(\)"):
        FeatureGate(8, 2)(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"FeatureGate: x: expected float32, .*, got torch\.int64"):
        FeatureGate(8, 2)(torch.zeros(3, 8, dtype=torch.int64))

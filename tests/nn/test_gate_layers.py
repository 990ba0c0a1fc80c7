"""FeatureGate and StackedBatchNorm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taskloom.nn import FeatureGate, StackedBatchNorm


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("maps", [1, 2, 3, 5])
def test_a_new_feature_gate_is_the_identity(maps: int) -> None:
    gate = FeatureGate(9, 4, maps)
    x = 10 * _normal(200, 9)
    assert torch.equal(gate(x), x)
    nn.init.normal_(gate.up)
    assert not torch.equal(gate(x), x)
    gate.reset_parameters()
    assert torch.equal(gate(x), x)


def test_feature_gate_is_its_formula_and_stays_between_0_and_2() -> None:
    gate = FeatureGate(9, 4, 3).double()
    nn.init.normal_(gate.up, std=3)
    x = _normal(20, 9).double()
    weight = torch.softmax(gate.mix(x), 1)
    factor = sum(weight[:, place, None] * 2 * torch.sigmoid(x @ gate.down[place] @ gate.up[place]) for place in range(3))
    torch.testing.assert_close(gate(x), x * factor, rtol=1e-6, atol=1e-6)
    ones = gate(x) / x
    assert bool(((ones > 0) & (ones < 2)).all())


def test_feature_gate_leaves_its_identity_in_training() -> None:
    gate = FeatureGate(9, 4)
    gate(_normal(20, 9)).square().sum().backward()
    assert gate.up.grad is not None
    assert bool(gate.up.grad.any())
    assert gate.down.grad is not None
    assert not gate.down.grad.any()


@pytest.mark.parametrize("sizes", [(0, 4, 2), (9, 0, 2), (9, 4, 0)])
def test_feature_gate_refuses_sizes_below_one(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        FeatureGate(*sizes)


def test_stacked_batch_norm_is_a_batch_norm_for_each_expert() -> None:
    norms = [nn.BatchNorm1d(5, eps=1e-3, momentum=0.2) for _ in range(3)]
    for place, norm in enumerate(norms):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        norm(_normal(30, 5, seed=place) * 3 + 1)
    stacked = StackedBatchNorm.from_norms(norms)
    z = 2 * _normal(17, 3, 5, seed=9) - 1
    for training in (True, False):
        stacked.train(training)
        expected = torch.stack([F.silu(norm.train(training)(z[:, place])) for place, norm in enumerate(norms)], 1)
        torch.testing.assert_close(stacked(z), expected, rtol=1e-5, atol=1e-5)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(stacked, name), torch.stack([getattr(norm, name) for norm in norms]))
    assert int(stacked.num_batches_tracked) == 2


def test_stacked_batch_norm_trains_and_is_restored() -> None:
    stacked = StackedBatchNorm(3, 5, activation=None)
    y = stacked(_normal(40, 3, 5))
    torch.testing.assert_close(y.mean(0), torch.zeros(3, 5), atol=1e-5, rtol=0)
    y.square().mean().backward()
    assert stacked.weight.grad is not None
    assert bool(stacked.weight.grad.all())
    other = StackedBatchNorm(3, 5, activation=None)
    other.load_state_dict(stacked.state_dict())
    z = _normal(4, 3, 5, seed=2)
    assert torch.equal(other.eval()(z), stacked.eval()(z))
    other.reset_parameters()
    torch.testing.assert_close(other(z), z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        ([], "expected norms of one width"),
        ([nn.BatchNorm1d(5), nn.BatchNorm1d(6)], "expected norms of one width"),
        ([nn.BatchNorm1d(5, affine=False)], "with parameters"),
        ([nn.BatchNorm1d(5, track_running_stats=False)], "statistics"),
        ([nn.BatchNorm1d(5, momentum=None)], "momentum"),
    ],
)
def test_norms_that_differ_are_refused(norms: list[nn.BatchNorm1d], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StackedBatchNorm.from_norms(norms)


@pytest.mark.parametrize("sizes", [(0, 5), (3, 0)])
def test_stacked_batch_norm_refuses_sizes_below_one(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        StackedBatchNorm(*sizes)


def test_stacked_batch_norm_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="activation: expected 'silu', 'relu' or None, got 'gelu'"):
        StackedBatchNorm(3, 5, activation="gelu")
    with pytest.raises(ValueError, match="at least two rows"):
        StackedBatchNorm(3, 5)(_normal(1, 3, 5))

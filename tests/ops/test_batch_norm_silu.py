"""batch_norm_silu beyond its contract: torch's norms, running statistics, large means, derivatives, errors, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled import compiled
from contract import assert_same_bits
from samples import weights
from torch import Tensor, nn

import taskloom

F64 = torch.float64
ACTIVATIONS = {None: lambda x: x, "relu": F.relu, "silu": F.silu}
activations = pytest.mark.parametrize("activation", list(ACTIVATIONS))


def inputs(dtype: torch.dtype = F64, rows: int = 9, experts: int = 3, features: int = 5) -> list[Tensor]:
    z = 3 * weights(rows, experts, features, dtype=dtype) + 1
    return [z.requires_grad_(), *(weights(experts, features, seed=seed, dtype=dtype).requires_grad_() for seed in (1, 2))]


def running(dtype: torch.dtype = F64, experts: int = 3, features: int = 5) -> tuple[Tensor, Tensor]:
    return weights(experts, features, seed=3, dtype=dtype), weights(experts, features, seed=4, dtype=dtype).square() + 0.5


@activations
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_is_torchs_batch_norm(activation: str | None, training: bool, backend: str) -> None:
    z, weight, bias = given = inputs()
    mean, var = running()
    plain = [one.flatten().clone() for one in (mean, var)]
    expected = F.batch_norm(z.flatten(1), *plain, weight.flatten(), bias.flatten(), training, 0.3, 0.01)
    expected = ACTIVATIONS[activation](expected).reshape(z.shape)
    with taskloom.backend(backend):
        y = taskloom.batch_norm_silu(z, weight, bias, mean, var, training=training, momentum=0.3, eps=0.01, activation=activation)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip((mean, var), plain, strict=True):
        torch.testing.assert_close(ours.flatten(), theirs, rtol=1e-12, atol=1e-12)
    slope = weights(*y.shape, seed=9, dtype=F64)
    for one, other in zip(torch.autograd.grad(y, given, slope), torch.autograd.grad(expected, given, slope), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_is_one_norm_for_each_expert_and_not_one_for_all() -> None:
    z = inputs()[0].detach()
    y = taskloom.batch_norm_silu(z, training=True)
    each = torch.stack([F.silu(nn.BatchNorm1d(5, dtype=F64)(z[:, expert])) for expert in range(3)], 1)
    together = F.silu(nn.BatchNorm1d(5, dtype=F64)(z.flatten(0, 1))).reshape(z.shape)
    torch.testing.assert_close(y, each, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(y, together, atol=1e-2)


def test_what_is_activated_has_mean_0_and_variance_1() -> None:
    z = inputs(torch.float32, rows=700)[0].detach()
    y = taskloom.batch_norm_silu(z, training=True, activation=None)
    torch.testing.assert_close(y.mean(0), torch.zeros(3, 5), rtol=0, atol=1e-4)
    torch.testing.assert_close(y.var(0, unbiased=False), torch.ones(3, 5), rtol=0, atol=1e-4)


def test_rows_do_not_depend_on_the_batch_outside_of_training() -> None:
    z, weight, bias = (one.detach() for one in inputs(torch.float32, rows=300, features=37))
    mean, var = running(torch.float32, features=37)
    y = taskloom.batch_norm_silu(z, weight, bias, mean, var, training=False)
    for rows in (slice(0, 1), slice(100, 117), slice(299, 300)):
        assert_same_bits(taskloom.batch_norm_silu(z[rows], weight, bias, mean, var, training=False), y[rows])


def test_a_large_mean_leaves_the_variance() -> None:
    z = 1000 + weights(5000, 2, 3)
    expected = F.silu(F.batch_norm(z.double().flatten(1), None, None, training=True)).reshape(z.shape)
    y = taskloom.batch_norm_silu(z, training=True)
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=1e-4)


def test_columns_do_not_depend_on_their_neighbours() -> None:
    z = weights(700, 2, 600)
    y = taskloom.batch_norm_silu(z, training=True)
    z[:, :, 300:] = torch.nan
    part = taskloom.batch_norm_silu(z, training=True)
    assert_same_bits(part[..., :300], y[..., :300])
    assert bool(part[..., 300:].isnan().all())


def test_bfloat16_statistics_are_float32() -> None:
    z = (100 + weights(2000, 1, 3)).bfloat16()
    mean, var = torch.zeros(1, 3), torch.zeros(1, 3)
    taskloom.batch_norm_silu(z, None, None, mean, var, training=True, momentum=1.0)
    torch.testing.assert_close(mean, z.float().mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(var, z.float().var(0), rtol=1e-5, atol=0)


@activations
def test_silu_is_as_near_as_torchs(activation: str | None) -> None:
    x = torch.linspace(-120, 120, 100_001)
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    exact = ACTIVATIONS[activation](x.double())
    y = taskloom.batch_norm_silu(x[:, None, None], None, None, zero, one, training=False, eps=0.0, activation=activation)[:, 0, 0]
    assert (y - exact).abs().max() <= 2 * (ACTIVATIONS[activation](x) - exact).abs().max() + 1e-6
    ends = torch.tensor([torch.inf, -torch.inf, torch.nan])
    got = taskloom.batch_norm_silu(ends[:, None, None], None, None, zero, one, training=False, activation=activation)[:, 0, 0]
    torch.testing.assert_close(got, ACTIVATIONS[activation](ends), equal_nan=True)


@activations
def test_gradients(activation: str | None) -> None:
    given = inputs()

    def train(*given: Tensor) -> Tensor:
        return taskloom.batch_norm_silu(*given, training=True, activation=activation)

    def apply(*given: Tensor) -> Tensor:
        return taskloom.batch_norm_silu(*given, *running(), training=False, activation=activation)

    with taskloom.backend("native"):
        assert torch.autograd.gradcheck(train, given, fast_mode=True)
        assert torch.autograd.gradcheck(apply, given, fast_mode=True)
    with taskloom.backend("reference"):
        assert torch.autograd.gradgradcheck(train, given, fast_mode=True)


def test_transforms() -> None:
    z, weight, bias = inputs()

    def loss(z: Tensor) -> Tensor:
        return taskloom.batch_norm_silu(z, weight, bias, training=True).square().sum()

    (expected,) = torch.autograd.grad(loss(z), z)
    torch.testing.assert_close(torch.func.grad(loss)(z.detach()), expected)
    _, tangent = torch.func.jvp(loss, (z.detach(),), (weights(*z.shape, seed=8, dtype=F64),))
    torch.testing.assert_close(tangent, (expected * weights(*z.shape, seed=8, dtype=F64)).sum())


def test_compiled_updates_its_statistics(fresh_compiler: None) -> None:
    mean, var = running(torch.float32)
    others = mean.clone(), var.clone()

    def loss(z: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return taskloom.batch_norm_silu(z, weight, bias, mean, var, training=True).square().sum()

    run = compiled(loss)
    for rows in (9, 12):
        given = inputs(torch.float32, rows)
        ours, theirs = (torch.autograd.grad(one(*given, *kept), given) for one, kept in ((run, (mean, var)), (loss, others)))
        for one, other in zip((*ours, mean, var), (*theirs, *others), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_an_op_that_raises_changes_nothing() -> None:
    mean, var = running()
    before = mean.clone(), var.clone()
    with pytest.raises(ValueError, match=r"z: expected at least two rows for a batch's statistics, got \(1, 3, 5\)"):
        taskloom.batch_norm_silu(inputs(rows=1)[0], None, None, mean, var, training=True)
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


Z, VECTOR = torch.zeros(4, 3, 5), torch.zeros(3, 5)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"z": Z.long()}, TypeError, "z: expected float32"),
        ({"z": Z[0]}, ValueError, r"z: expected shape \[B, E, D\], got \(3, 5\)"),
        ({"weight": VECTOR.int()}, TypeError, "weight: expected float32"),
        ({"bias": VECTOR.t()}, ValueError, r"bias: expected shape \(3, 5\) as z's experts and features, got \(5, 3\)"),
        ({"running_mean": VECTOR}, ValueError, "running_mean, running_var: expected both or none"),
        ({"training": False}, ValueError, "running_mean, running_var: expected both where training is False"),
        ({"activation": "gelu"}, ValueError, "activation: expected 'silu', 'relu' or None, got 'gelu'"),
        ({"z": Z[:0]}, ValueError, "z: expected at least two rows"),
    ],
)
def test_errors(backend: str, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with taskloom.backend(backend), pytest.raises(error, match=f"batch_norm_silu: {message}"):
        taskloom.batch_norm_silu(**{"z": Z, "training": True} | changed)


def test_numbers_have_no_gradient() -> None:
    z, mean, var = inputs()[0].detach(), *running()
    for name in ("eps", "momentum"):
        with pytest.raises(TypeError, match=f"batch_norm_silu: {name}: expected a number, got a tensor that requires grad"):
            taskloom.batch_norm_silu(z, None, None, mean, var, training=True, **{name: torch.tensor(0.1, requires_grad=True)})
    with pytest.raises(TypeError, match="batch_norm_silu: momentum: expected a number, got None"):
        taskloom.batch_norm_silu(z, None, None, mean, var, training=True, momentum=None)

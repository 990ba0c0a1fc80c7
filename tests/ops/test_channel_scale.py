"""channel_scale beyond its contract: the eager form, what is read, derivatives, errors, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled import compiled
from contract import assert_same_bits
from samples import weights
from torch import Tensor

import taskloom

F64 = torch.float64
STARTS = torch.tensor([0, 5, 2])
ACTIVATIONS = {None: lambda x: x, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}
activations = pytest.mark.parametrize("activation", list(ACTIVATIONS))


def inputs(dtype: torch.dtype = F64) -> list[Tensor]:
    shapes = ((3, 9, 4, 5), (3, 9), (9,))
    return [weights(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate(shapes)]


def window_mask() -> Tensor:
    place = torch.arange(9)
    return ((place >= STARTS[:, None]) & (place < STARTS[:, None] + 4))[..., None, None]


@activations
@pytest.mark.parametrize("window", [True, False])
def test_is_the_eager_form(activation: str | None, window: bool) -> None:
    x, scale, bias = given = inputs()
    where: dict[str, Any] = {"start": STARTS, "width": 4} if window else {}
    y = taskloom.channel_scale(x, scale, bias, activation=activation, **where)
    expected = ACTIVATIONS[activation](x * scale[..., None, None] + bias[:, None, None])
    if window:
        expected = expected * window_mask()
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    slope = weights(*y.shape, seed=9, dtype=F64)
    for one, other in zip(torch.autograd.grad(y, given, slope), torch.autograd.grad(expected, given, slope), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@activations
def test_channels_outside_are_not_read(activation: str | None) -> None:
    x, scale, bias = inputs(torch.float32)
    mask = window_mask()
    poisoned = torch.where(mask, x, torch.nan).detach().requires_grad_()
    factors = torch.where(mask[..., 0, 0], scale, torch.nan).detach().requires_grad_()
    y = taskloom.channel_scale(poisoned, factors, bias, start=STARTS, width=4, activation=activation)
    assert_same_bits(y, taskloom.channel_scale(x, scale, bias, start=STARTS, width=4, activation=activation))
    assert not y[~mask.expand(y.shape)].any()
    gradients = torch.autograd.grad(y.square().sum(), [poisoned, factors, bias])
    assert all(bool(one.isfinite().all()) for one in gradients)
    assert not gradients[0][~mask.expand(y.shape)].any()
    assert not gradients[1][~mask[..., 0, 0]].any()


@activations
def test_gradients(activation: str | None) -> None:
    def scaled(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return taskloom.channel_scale(x, scale, bias, start=STARTS, width=4, activation=activation)

    with taskloom.backend("native"):
        assert torch.autograd.gradcheck(scaled, inputs(), fast_mode=True)
    with taskloom.backend("reference"):
        assert torch.autograd.gradgradcheck(scaled, inputs(), fast_mode=True)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_activations_are_as_near_as_torchs(activation: str) -> None:
    x = torch.linspace(-20, 20, 100_003)
    exact = ACTIVATIONS[activation](x.double())
    y = taskloom.channel_scale(x[None, None], torch.ones(1, 1), activation=activation)[0, 0]
    torchs = ACTIVATIONS[activation](x)
    assert (y - exact).abs().max() <= 2 * (torchs - exact).abs().max() + 1e-6
    ends = torch.tensor([torch.inf, torch.nan, -200.0, 200.0])
    got = taskloom.channel_scale(ends[None, None], torch.ones(1, 1), activation=activation)[0, 0]
    torch.testing.assert_close(got, ACTIVATIONS[activation](ends.double()).float(), equal_nan=True)


def test_bias_is_added_up_over_samples() -> None:
    x, scale, bias = inputs()
    y = taskloom.channel_scale(x, scale, bias, start=STARTS, width=4)
    (found,) = torch.autograd.grad(y.sum(), bias)
    torch.testing.assert_close(found, 20.0 * window_mask().sum(0)[:, 0, 0].double())


def test_transforms() -> None:
    x, scale, bias = inputs()

    def loss(x: Tensor) -> Tensor:
        return taskloom.channel_scale(x, scale, bias, start=STARTS, width=4, activation="silu").square().sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)
    _, tangent = torch.func.jvp(loss, (x.detach(),), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, expected.sum())


def test_compiled(fresh_compiler: None) -> None:
    given = inputs(torch.float32)

    def loss(x: Tensor, scale: Tensor, bias: Tensor, start: Tensor) -> Tensor:
        return taskloom.channel_scale(x, scale, bias, start=start, width=4, activation="gelu").square().sum()

    run = compiled(loss)
    for count in (3, 2):
        leaves = [given[0].detach()[:count].requires_grad_(), given[1].detach()[:count].requires_grad_(), given[2]]
        ours, theirs = (torch.autograd.grad(one(*leaves, STARTS[:count]), leaves) for one in (run, loss))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


X, SCALE = torch.zeros(3, 24, 5), torch.zeros(3, 24)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": X.long()}, TypeError, "x: expected float32"),
        ({"x": X[0, 0]}, ValueError, r"x: expected shape \[N, C, ...\] with at least one channel, got \(5,\)"),
        ({"scale": SCALE[0]}, ValueError, r"scale: expected shape \(3, 24\) as x's samples and channels, got \(24,\)"),
        ({"bias": SCALE}, ValueError, r"bias: expected shape \(24,\) as x's channels, got \(3, 24\)"),
        ({"activation": "tanh"}, ValueError, "activation: expected None, 'relu', 'gelu' or 'silu', got 'tanh'"),
        ({"start": STARTS}, ValueError, "start, width: expected both or none, got only start"),
        ({"width": 3}, ValueError, "start, width: expected both or none, got only width"),
        ({"start": STARTS, "width": 20}, ValueError, "start: expected windows within 24 channels, got 5 to 24 for sample 1"),
    ],
)
def test_errors(backend: str, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with taskloom.backend(backend), pytest.raises(error, match=f"channel_scale: {message}"):
        taskloom.channel_scale(**{"x": X, "scale": SCALE} | changed)

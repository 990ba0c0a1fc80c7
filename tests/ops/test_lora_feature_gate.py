"""lora_feature_gate beyond its contract: the formula, the identity, rows by themselves, memory, derivatives, errors, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled import compiled
from contract import assert_same_bits
from samples import weights
from torch import Tensor

import taskloom

F64 = torch.float64


def inputs(dtype: torch.dtype = F64, rows: int = 6, features: int = 11, maps: int = 3, rank: int = 4) -> list[Tensor]:
    shares = weights(rows, maps, seed=3).softmax(1).to(dtype)
    given = (
        weights(rows, features, dtype=dtype),
        weights(maps, features, rank, seed=1, dtype=dtype, scale=features**-0.5),
        weights(maps, rank, features, seed=2, dtype=dtype),
        shares,
    )
    return [one.requires_grad_() for one in given]


def eager(x: Tensor, down: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    maps = 2 * torch.sigmoid(torch.einsum("blr,lrd->bld", torch.einsum("bd,ldr->blr", x, down), up))
    return x * (weight[..., None] * maps).sum(1)


def test_is_the_eager_form() -> None:
    given = inputs()
    y, expected = taskloom.lora_feature_gate(*given), eager(*given)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    slope = weights(*y.shape, seed=9, dtype=F64)
    for one, other in zip(torch.autograd.grad(y, given, slope), torch.autograd.grad(expected, given, slope), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_the_identity_without_up(backend: str, dtype: torch.dtype) -> None:
    x, down, up, _ = (one.detach() for one in inputs(dtype, 40, 37, 2))
    shares = torch.rand(40, 2, generator=torch.Generator().manual_seed(0))
    shares[:, 1] = 1 - shares[:, 0]
    with taskloom.backend(backend):
        assert torch.equal(taskloom.lora_feature_gate(x, down, torch.zeros_like(up), shares), x)


def test_gate_saturates_at_0_and_2() -> None:
    x, down, weight = torch.ones(2, 4), torch.ones(1, 4, 1), torch.ones(2, 1)
    up = torch.tensor([[[-1e4, -100.0, 100.0, 1e4]]])
    with taskloom.backend("native"):
        y = taskloom.lora_feature_gate(x, down, up, weight)
    assert y.tolist() == [[0.0, 0.0, 2.0, 2.0]] * 2


def test_a_rows_nan_stays_in_its_row() -> None:
    given = [one.detach() for one in inputs(torch.float32)]
    expected = taskloom.lora_feature_gate(*given)
    given[0][2, 3] = torch.nan
    given[3][4, 1] = torch.nan
    y = taskloom.lora_feature_gate(*given)
    others = [0, 1, 3, 5]
    torch.testing.assert_close(y[others], expected[others], rtol=1e-6, atol=1e-6)
    assert bool(y[[2, 4]].isnan().all())


def test_gradients() -> None:
    with taskloom.backend("native"):
        assert torch.autograd.gradcheck(taskloom.lora_feature_gate, inputs(), fast_mode=True)
    with taskloom.backend("reference"):
        assert torch.autograd.gradgradcheck(taskloom.lora_feature_gate, inputs(), fast_mode=True)


def test_repeats_its_bits() -> None:
    given = inputs(torch.float32, 700, 900, 2, 16)
    slope = weights(700, 900, seed=5)
    first, second = (torch.autograd.grad(taskloom.lora_feature_gate(*given), given, slope) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert_same_bits(one, other)


def test_transforms() -> None:
    x, *others = inputs()

    def loss(x: Tensor) -> Tensor:
        return taskloom.lora_feature_gate(x, *others).square().sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)
    _, tangent = torch.func.jvp(loss, (x.detach(),), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, expected.sum())


def test_autocast_changes_nothing() -> None:
    given = [one.detach() for one in inputs(torch.float32)]
    expected = taskloom.lora_feature_gate(*given)
    for backend in ("native", "reference"):
        with taskloom.backend(backend), torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(taskloom.lora_feature_gate(*given), expected, rtol=1e-6, atol=1e-6)


def test_compiled(fresh_compiler: None) -> None:
    def loss(*given: Tensor) -> Tensor:
        return taskloom.lora_feature_gate(*given).square().sum()

    run = compiled(loss)
    for rows in (6, 4):
        given = inputs(torch.float32, rows)
        ours, theirs = (torch.autograd.grad(one(*given), given) for one in (run, loss))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


GIVEN: dict[str, Any] = {"x": torch.zeros(5, 8), "down": torch.zeros(2, 8, 3), "up": torch.zeros(2, 3, 8), "weight": torch.zeros(5, 2)}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.zeros(5, 8).long()}, TypeError, "x: expected float32"),
        ({"weight": [1, 2]}, TypeError, "weight: expected a tensor, got list"),
        ({"x": torch.zeros(5, 2, 8)}, ValueError, r"x: expected shape \[B, D\] with at least one feature, got \(5, 2, 8\)"),
        ({"down": torch.zeros(2, 7, 3)}, ValueError, r"down: expected shape \[L, 8, r\] with L and r at least 1 .*got \(2, 7, 3\)"),
        ({"down": torch.zeros(2, 8, 0)}, ValueError, r"down: expected .* at least 1 .*got \(2, 8, 0\)"),
        ({"down": torch.zeros(0, 8, 3)}, ValueError, r"down: expected .* at least 1 .*got \(0, 8, 3\)"),
        ({"up": torch.zeros(2, 4, 8)}, ValueError, r"up: expected shape \(2, 3, 8\) as down says, got \(2, 4, 8\)"),
        ({"weight": torch.zeros(5, 3)}, ValueError, r"weight: expected shape \(5, 2\) as x's rows and down's maps say, got \(5, 3\)"),
    ],
)
def test_errors(backend: str, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with taskloom.backend(backend), pytest.raises(error, match=f"lora_feature_gate: {message}"):
        taskloom.lora_feature_gate(**GIVEN | changed)

"""expert_combine beyond its contract: the forms that others use, derivatives, batch invariance, errors, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases_expert import chosen, combined
from compiled import compiled
from contract import assert_same_bits
from samples import normal
from torch import Tensor

import taskloom
from taskloom.ops.gating import expert_combine_backward

F64 = torch.float64


def leaves(dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    y, weight, inverse = combined(7, 3, 10, dtype, dtype)
    return y.requires_grad_(), weight.requires_grad_(), inverse


def test_is_the_loop_over_experts() -> None:
    tokens, experts, k, width = 31, 6, 2, 12
    ids = chosen(tokens, experts, k)
    order = taskloom.expert_sort(ids, experts)
    y, weight = normal(tokens * k, width, dtype=F64).requires_grad_(), normal(tokens, k, seed=1, dtype=F64).requires_grad_()
    expected = torch.zeros(tokens, width, dtype=F64)
    for expert in range(experts):
        token, slot = torch.where(ids == expert)
        begin, end = order.offsets[expert : expert + 2].tolist()
        expected = expected.index_add(0, token, y[begin:end] * weight[token, slot, None])
    out = taskloom.expert_combine(y, weight, order.inverse)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
    slopes = normal(tokens, width, seed=2, dtype=F64)
    for ours, theirs in zip(torch.autograd.grad(out, (y, weight), slopes), torch.autograd.grad(expected, (y, weight), slopes), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradients() -> None:
    y, weight, inverse = leaves()

    def combine(y: Tensor, weight: Tensor) -> Tensor:
        return taskloom.expert_combine(y, weight, inverse)

    with taskloom.backend("native"):
        assert torch.autograd.gradcheck(combine, (y, weight), fast_mode=True)
    with taskloom.backend("reference"):
        assert torch.autograd.gradgradcheck(combine, (y, weight), fast_mode=True)


def test_a_second_derivative_is_refused() -> None:
    y, weight, inverse = leaves()
    (slope,) = torch.autograd.grad(taskloom.expert_combine(y, weight, inverse).square().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="expert_combine_backward has no gradient"):
        slope.sum().backward()


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_what_is_wanted(wanted: tuple[bool, bool]) -> None:
    y, weight, inverse = leaves()
    slopes = normal(7, 10, seed=4, dtype=F64)
    both = expert_combine_backward(slopes, y, weight, inverse)
    found = expert_combine_backward(slopes, y, weight, inverse, for_y=wanted[0], for_weight=wanted[1])
    for one, other, want in zip(found, both, wanted, strict=True):
        assert torch.equal(one, other) if want else one.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    y, weight, inverse = combined(50, 4, 70, dtype)
    out = taskloom.expert_combine(y, weight, inverse)
    rows = inverse[20:23].long()
    alone = taskloom.expert_combine(y[rows.reshape(-1)], weight[20:23], torch.arange(12).reshape(3, 4))
    assert_same_bits(out[20:23], alone)


def test_low_precision_is_rounded_once() -> None:
    y, weight, inverse = combined(200, 8, 64, torch.bfloat16)
    exact = (weight.double()[..., None] * y[inverse.long()].double()).sum(1)
    assert torch.equal(taskloom.expert_combine(y, weight, inverse), exact.float().bfloat16())


def test_transforms() -> None:
    y, weight, inverse = leaves()

    def loss(y: Tensor) -> Tensor:
        return taskloom.expert_combine(y, weight, inverse).square().sum()

    (expected,) = torch.autograd.grad(loss(y), y)
    torch.testing.assert_close(torch.func.grad(loss)(y.detach()), expected)
    _, tangent = torch.func.jvp(loss, (y.detach(),), (torch.ones_like(y),))
    torch.testing.assert_close(tangent, expected.sum())


def test_compiled(fresh_compiler: None) -> None:
    def loss(y: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
        return taskloom.expert_combine(y, weight, inverse).square().sum()

    run = compiled(loss)
    for tokens in (4, 9):
        y, weight, inverse = combined(tokens, 3, 10, torch.float32)
        given = y.requires_grad_(), weight.requires_grad_()
        ours, theirs = (torch.autograd.grad(one(*given, inverse), given) for one in (run, loss))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)


Y, WEIGHT, INVERSE = combined(4, 3, 5, torch.float32)


def _with(entry: int, value: int) -> Tensor:
    changed = INVERSE.clone()
    changed.view(-1)[entry] = value
    return changed


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"y": Y.long()}, TypeError, "y: expected float32"),
        ({"weight": WEIGHT.long()}, TypeError, "weight: expected float32"),
        ({"inverse": INVERSE.float()}, TypeError, "inverse: expected a tensor of int32 or int64, got torch.float32"),
        ({"y": Y[:11]}, ValueError, r"y: expected shape \[12, D\], a row for each entry of weight, got \(11, 5\)"),
        ({"y": Y[0]}, ValueError, r"y: expected shape \[12, D\]"),
        ({"inverse": INVERSE.reshape(-1)}, ValueError, r"inverse: expected shape \(4, 3\) as weight, got \(12,\)"),
        ({"weight": torch.tensor(1.0)}, ValueError, r"weight: expected shape \[..., k\], got \(\)"),
        ({"inverse": _with(7, 12)}, ValueError, "inverse: expected 0 to 11, a row of y, got 12 at entry 7"),
        ({"inverse": _with(2, -1)}, ValueError, "inverse: expected 0 to 11, a row of y, got -1 at entry 2"),
    ],
)
def test_errors(backend: str, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with taskloom.backend(backend):
        with pytest.raises(error, match=f"expert_combine: {message}"):
            taskloom.expert_combine(**{"y": Y, "weight": WEIGHT, "inverse": INVERSE} | changed)
        with pytest.raises(error, match=f"expert_combine_backward: {message}"):
            expert_combine_backward(**{"gradient": torch.ones(4, 5), "y": Y, "weight": WEIGHT, "inverse": INVERSE} | changed)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_row_that_no_slot_names_would_have_no_gradient(backend: str) -> None:
    twice = _with(3, int(INVERSE.view(-1)[1]))
    with taskloom.backend(backend), pytest.raises(ValueError, match=r"inverse: expected each row of y once, got \d+ again at entry 3"):
        expert_combine_backward(torch.ones(4, 5), Y, WEIGHT, twice)
    expert_combine_backward(torch.ones(4, 5), Y, WEIGHT, twice, for_y=False)


def test_reference_under_vmap_and_compiled(fresh_compiler: None) -> None:
    y, weight, inverse = leaves()
    many = torch.stack([y, 2 * y]).detach()
    found = torch.func.vmap(lambda one: taskloom.expert_combine(one, weight, inverse))(many)
    torch.testing.assert_close(found, torch.stack([taskloom.expert_combine(one, weight, inverse) for one in many]))
    places = torch.stack([inverse, inverse.flip(0)])
    found = torch.func.vmap(lambda one: taskloom.expert_combine(y, weight, one))(places)
    torch.testing.assert_close(found, torch.stack([taskloom.expert_combine(y, weight, one) for one in places]))
    with taskloom.backend("reference"):
        torch.testing.assert_close(compiled(taskloom.expert_combine)(y, weight, inverse), taskloom.expert_combine(y, weight, inverse))

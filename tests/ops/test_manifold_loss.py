"""manifold_loss beyond its contract: the card's invariants, what is read, derivatives, errors, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases_manifold_loss import neighbours
from compiled import compiled
from contract import assert_same_bits
from torch import Tensor

import taskloom
from taskloom.ops.gating import manifold_loss_backward

F64 = torch.float64


def test_is_the_eager_form() -> None:
    r, table, ids, weight = neighbours(9, 33, 12, 3, *(F64,) * 3)
    r.requires_grad_()
    loss = taskloom.manifold_loss(r, table, ids, weight)
    expected = (weight * (r[:, None] - table[ids]).square().sum(-1)).sum(-1)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    slopes = torch.linspace(-1, 2, 9, dtype=F64)
    (found,), (wanted,) = torch.autograd.grad(loss, r, slopes), torch.autograd.grad(expected, r, slopes)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)


def test_is_the_distance_to_the_weighed_mean_and_a_constant() -> None:
    r, table, ids, weight = neighbours(9, 33, 12, 3, *(F64,) * 3)
    weight = weight / weight.sum(-1, keepdim=True)
    near = table[ids]
    mean = (weight[..., None] * near).sum(1)
    spread = (weight * (near - mean[:, None]).square().sum(-1)).sum(-1)
    torch.testing.assert_close(taskloom.manifold_loss(r, table, ids, weight), (r - mean).square().sum(-1) + spread, rtol=1e-10, atol=0)


def test_is_zero_where_a_row_is_all_of_its_neighbours() -> None:
    _, table, ids, weight = neighbours(6, 17, 5, 3)
    same = ids[:, :1].expand(6, 3)
    assert not taskloom.manifold_loss(table[ids[:, 0]], table, same, weight).any()
    assert bool((taskloom.manifold_loss(table[(ids[:, 0] + 1) % 5], table, same, weight) > 0).all())


def test_rows_without_neighbours_have_neither_loss_nor_gradient() -> None:
    r, table, ids, weight = neighbours(6, 17, 5, 3)
    ids[1], weight[2], r[1] = -1, 0, torch.inf
    r.requires_grad_()
    loss = taskloom.manifold_loss(r, table, ids, weight)
    (dr,) = torch.autograd.grad(loss.sum(), r)
    assert not loss[[1, 2]].any()
    assert not dr[[1, 2]].any()
    assert bool((loss[[0, 3, 4, 5]] > 0).all())


def test_only_named_rows_are_read() -> None:
    r, table, ids, weight = neighbours(8, 40, 30, 2, table_dtype=torch.float16)
    others = torch.ones(30, dtype=torch.bool)
    others[ids.reshape(-1)] = False
    poisoned = table.clone()
    poisoned[others] = torch.nan
    assert others.any()
    assert_same_bits(taskloom.manifold_loss(r, poisoned, ids, weight), taskloom.manifold_loss(r, table, ids, weight))


def test_a_row_does_not_depend_on_its_batch() -> None:
    r, table, ids, weight = neighbours(60, 130, 30, 3)
    loss = taskloom.manifold_loss(r, table, ids, weight)
    assert_same_bits(loss[40:43], taskloom.manifold_loss(r[40:43], table, ids[40:43], weight[40:43]))


def test_gradients() -> None:
    r, table, ids, weight = neighbours(4, 9, 5, 3, *(F64,) * 3)

    def loss(r: Tensor) -> Tensor:
        return taskloom.manifold_loss(r, table, ids, weight)

    r.requires_grad_()
    with taskloom.backend("native"):
        assert torch.autograd.gradcheck(loss, (r,), fast_mode=True)
    with taskloom.backend("reference"):
        assert torch.autograd.gradgradcheck(loss, (r,), fast_mode=True)


@pytest.mark.parametrize("name", ["reference", "weight"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_constants_have_no_gradient(name: str, backend: str) -> None:
    given = dict(zip(("r", "reference", "ids", "weight"), neighbours(4, 9, 5, 3), strict=True))
    given[name].requires_grad_()
    with taskloom.backend(backend), pytest.raises(RuntimeError, match=f"manifold_loss: {name}: expected a constant"):
        taskloom.manifold_loss(**given)
    with torch.no_grad():
        assert taskloom.manifold_loss(**given).shape == (4,)


def test_a_table_that_changed_before_backward() -> None:
    r, table, ids, weight = neighbours(4, 9, 5, 3)
    loss = taskloom.manifold_loss(r.requires_grad_(), table, ids, weight).sum()
    table.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_transforms() -> None:
    r, table, ids, weight = neighbours(4, 9, 5, 3, *(F64,) * 3)

    def loss(r: Tensor) -> Tensor:
        return taskloom.manifold_loss(r, table, ids, weight).sum()

    expected = manifold_loss_backward(torch.ones(4, dtype=F64), r, table, ids, weight)
    torch.testing.assert_close(torch.func.grad(loss)(r), expected)
    _, tangent = torch.func.jvp(loss, (r,), (torch.ones_like(r),))
    torch.testing.assert_close(tangent, expected.sum())


def test_compiled(fresh_compiler: None) -> None:
    def loss(r: Tensor, table: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
        return taskloom.manifold_loss(r, table, ids, weight).square().sum()

    run = compiled(loss)
    for rows in (3, 8):
        r, *rest = neighbours(rows, 20, 7, 2)
        r.requires_grad_()
        (ours,), (theirs,) = (torch.autograd.grad(one(r, *rest), r) for one in (run, loss))
        torch.testing.assert_close(ours, theirs)


GIVEN = dict(zip(("r", "reference", "ids", "weight"), neighbours(4, 9, 5, 3), strict=True))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"r": GIVEN["r"].long()}, TypeError, "r: expected float32"),
        ({"reference": GIVEN["ids"]}, TypeError, "reference: expected float32"),
        ({"weight": GIVEN["ids"]}, TypeError, "weight: expected float32"),
        ({"ids": GIVEN["ids"].short()}, TypeError, "ids: expected a tensor of int32 or int64, got torch.int16"),
        ({"r": GIVEN["r"][0]}, ValueError, r"r: expected shape \[B, R\], got \(9,\)"),
        ({"reference": GIVEN["reference"][:, :8]}, ValueError, r"reference: expected shape \[n_ref, 9\], rows as those of r, got \(5, 8\)"),
        ({"ids": GIVEN["ids"][:3]}, ValueError, r"ids: expected shape \[4, k\], neighbours of each row of r, got \(3, 3\)"),
        ({"weight": GIVEN["weight"][:, :2]}, ValueError, r"weight: expected shape \(4, 3\) as ids, got \(4, 2\)"),
        ({"ids": torch.full((4, 3), 5)}, ValueError, "ids: expected -1 to 4, a row of reference or -1 for none, got 5 at entry 0"),
        ({"ids": torch.full((4, 3), -2)}, ValueError, "ids: expected -1 to 4, .*, got -2 at entry 0"),
    ],
)
def test_errors(backend: str, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with taskloom.backend(backend):
        with pytest.raises(error, match=f"manifold_loss: {message}"):
            taskloom.manifold_loss(**GIVEN | changed)
        with pytest.raises(error, match=f"manifold_loss_backward: {message}"):
            manifold_loss_backward(torch.ones(4), **GIVEN | changed)


def test_reference_under_vmap_and_compiled(fresh_compiler: None) -> None:
    r, table, ids, weight = neighbours(6, 17, 5, 3)
    many = torch.stack([ids, ids.flip(0)])
    found = torch.func.vmap(lambda one: taskloom.manifold_loss(r, table, one, weight))(many)
    torch.testing.assert_close(found, torch.stack([taskloom.manifold_loss(r, table, one, weight) for one in many]))
    with taskloom.backend("reference"):
        expected = taskloom.manifold_loss(r, table, ids, weight)
        torch.testing.assert_close(compiled(taskloom.manifold_loss)(r, table, ids, weight), expected)

"""lowrank_merge and its kin beyond their contracts: properties, derivatives, memory, what is in place, errors, compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from allocations import allocated
from cases_lowrank_merge import factors
from compiled import compiled
from contract import assert_close, assert_same_bits
from samples import weights
from torch import Tensor

import taskloom
from taskloom.ops.lowrank import _products

F64 = torch.float64


def _dense(base: Tensor, A: list[Tensor], B: list[Tensor], weight: list[float] | Tensor) -> Tensor:
    return base.double() + sum(float(w) * (b.double() @ a.double()) for w, a, b in zip(weight, A, B, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapters_of_zeros_leave_the_base(dtype: torch.dtype) -> None:
    base = weights(31, 47, dtype=dtype)
    right, _ = factors(31, 47, [3, 4])
    zeros = [torch.zeros(31, 3), torch.zeros(31, 4)]
    assert_same_bits(taskloom.lowrank_merge(base, right, zeros), base)
    assert_same_bits(taskloom.lowrank_merge(base, *factors(31, 47, [3]), 0.0), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_once(dtype: torch.dtype) -> None:
    base, (right, left) = weights(64, 300, dtype=dtype), factors(64, 300, [8, 8], dtype)
    got = taskloom.lowrank_merge(base, right, left, [0.5, -1.5])
    once = _dense(base, right, left, [0.5, -1.5]).float().to(dtype)
    # float32 sums may fall on the other side of a tie between two numbers of the narrow dtype.
    assert (got != once).float().mean() < 1e-3
    ulp = torch.nextafter(once.abs(), torch.full_like(once, torch.inf)) - once.abs()
    assert bool(((got - once).abs() <= ulp).all())


def test_one_after_the_other_is_nearly_all_at_once() -> None:
    base, (right, left) = weights(40, 50), factors(40, 50, [2, 5])
    together = taskloom.lowrank_merge(base, right, left, [0.5, 2.0])
    first = taskloom.lowrank_merge(base, right[0], left[0], 0.5)
    assert torch.allclose(taskloom.lowrank_merge(first, right[1], left[1], 2.0), together, rtol=1e-5, atol=1e-6)
    stacked = taskloom.lowrank_merge(base, torch.cat(right), torch.cat([0.5 * left[0], 2 * left[1]], 1))
    assert_same_bits(stacked, together)


def test_scale_is_peft_alpha_over_rank() -> None:
    base, (right, left) = weights(9, 8), factors(9, 8, [2, 4])
    got = taskloom.lowrank_merge(base, right, left, [0.5, 1.0], scale=[16 / 2, 16 / 4])
    assert_close(got, _dense(base, right, left, [4.0, 4.0]).float())
    weight = torch.tensor([0.5, 1.0], requires_grad=True)
    assert_same_bits(taskloom.lowrank_merge(base, right, left, weight, scale=[8.0, 4.0]).detach(), got)


@pytest.mark.parametrize("scaled", [True, False])
def test_gradients(scaled: bool) -> None:
    right, left = factors(4, 5, [1, 2], F64)
    leaves = [weights(4, 5, dtype=F64), *right, *left, weights(2, seed=1, dtype=F64)] + [weights(4, seed=2, dtype=F64)] * scaled

    def merge(base: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        return taskloom.lowrank_merge(base, [a, b], [c, d], weight, row_scale=scale)

    given = [one.requires_grad_() for one in leaves]
    with taskloom.backend("native"):
        assert torch.autograd.gradcheck(merge, given)
    with taskloom.backend("reference"):
        assert torch.autograd.gradgradcheck(merge, given)


def test_gradients_of_tasks() -> None:
    leaves = [weights(3, 4, dtype=F64), weights(2, 2, 4, dtype=F64), weights(2, 3, 2, dtype=F64, seed=1), weights(2, dtype=F64)]
    with taskloom.backend("native"):
        assert torch.autograd.gradcheck(taskloom.lowrank_merge_tasks, [one.requires_grad_() for one in leaves])


def test_gradients_are_the_formulas_of_icm_fusion() -> None:
    base, (right, left), weight = weights(30, 40), factors(30, 40, [3, 2]), torch.tensor([0.5, -2.0])
    leaves = [one.requires_grad_() for one in (*right, *left, weight)]
    gradient = weights(30, 40, seed=20)
    found = torch.autograd.grad(taskloom.lowrank_merge(base, right, left, weight), leaves, gradient)
    with torch.no_grad():
        expected = [w * b.T @ gradient for w, b in zip(weight, left, strict=True)]
        expected += [w * gradient @ a.T for w, a in zip(weight, right, strict=True)]
        expected.append(torch.stack([((b.T @ gradient) * a).sum() for a, b in zip(right, left, strict=True)]))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_only_where_needed() -> None:
    base, (right, left) = weights(6, 7).requires_grad_(), factors(6, 7, [2, 3])
    left[1].requires_grad_()
    taskloom.lowrank_merge(base, right, left).sum().backward()
    assert base.grad is not None
    assert base.grad.equal(torch.ones(6, 7))
    assert left[1].grad is not None
    assert all(one.grad is None for one in (*right, left[0]))


def test_a_second_derivative_is_refused() -> None:
    right, left = factors(4, 5, [2])
    a = right[0].requires_grad_()
    (gradient,) = torch.autograd.grad(taskloom.lowrank_merge(weights(4, 5), a, left[0]).square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="lowrank_merge_backward has no gradient"):
        gradient.sum().backward()


@pytest.mark.parametrize("adapters", [1, 4])
def test_nothing_of_the_size_of_a_weight_beside_the_output(monkeypatch: pytest.MonkeyPatch, adapters: int) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False
    monkeypatch.setattr(_products, "TILE", 1 << 16)
    rows, columns, ranks = 1024, 1536, [4] * adapters
    base, (right, left) = weights(rows, columns, dtype=torch.bfloat16), factors(rows, columns, ranks)
    thin = 4 * sum(ranks) * (rows + columns)
    slack = 64 << 10
    assert allocated(lambda: taskloom.lowrank_merge(base, right, left)) <= base.nbytes + thin + slack
    assert allocated(lambda: taskloom.lowrank_merge_(base, right, left, 0.1)) <= thin + slack
    assert allocated(lambda: taskloom.lowrank_norm(base, right, left)) <= thin + slack
    leaves = [one.requires_grad_() for one in (*right, *left)]
    merged, gradient = taskloom.lowrank_merge(base, right, left), weights(rows, columns, dtype=torch.bfloat16)
    tile = 4 * _products.TILE
    assert allocated(lambda: torch.autograd.grad(merged, leaves, gradient)) <= 6 * thin + 2 * tile + slack


def test_in_place_leaves_what_is_beside_a_view() -> None:
    fused = weights(90, 40, dtype=torch.bfloat16)
    before = fused.clone()
    right, left = factors(30, 20, [4])
    assert taskloom.lowrank_merge_(fused[30:60, 10:30], right, left).data_ptr() == fused[30:60, 10:30].data_ptr()
    assert_same_bits(fused[30:60, 10:30], taskloom.lowrank_merge(before[30:60, 10:30], right, left))
    fused[30:60, 10:30] = before[30:60, 10:30]
    assert_same_bits(fused, before)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_base_may_overlap_the_target(backend: str) -> None:
    memory, (right, left) = weights(40, 30), factors(30, 30, [2])
    expected = taskloom.lowrank_merge(memory[5:35], right, left)
    with taskloom.backend(backend):
        taskloom.lowrank_merge_(memory[:30], right, left, base=memory[5:35])
    assert_close(memory[:30], expected)


def test_factors_may_be_part_of_the_target() -> None:
    target = weights(20, 20)
    expected = taskloom.lowrank_merge(target, target[:3].clone(), target[:, :3].clone())
    taskloom.lowrank_merge_(target, target[:3], target[:, :3])
    assert_same_bits(target, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge(dtype: torch.dtype) -> None:
    base, (right, left) = weights(30, 40, dtype=dtype), factors(30, 40, [3, 2])
    merged = taskloom.lowrank_merge(base, right, left, [0.5, 2.0])
    kept = merged.clone()
    assert_same_bits(taskloom.lowrank_unmerge_(kept, right, left, [0.5, 2.0], base=base), base)
    assert kept.data_ptr() != base.data_ptr()
    subtracted = taskloom.lowrank_unmerge_(merged, right, left, [0.5, 2.0])
    rounding = torch.finfo(dtype).eps * torch.maximum(merged.abs(), base.abs()).max()
    assert (subtracted - base).abs().max() <= 4 * rounding


def test_tasks_are_single_merges() -> None:
    base, A, B = weights(30, 40, dtype=torch.bfloat16), weights(3, 4, 40), weights(3, 30, 4, seed=1)
    merged = taskloom.lowrank_merge_tasks(base, A, B, [0.5, 1.0, 2.0])
    out = torch.zeros_like(base)
    for t, weight in enumerate((0.5, 1.0, 2.0)):
        assert_same_bits(merged[t], taskloom.lowrank_merge(base, A[t], B[t], weight))
        assert taskloom.lowrank_merge_tasks(base, A, B, [0.5, 1.0, 2.0], select=t, out=out) is out
        assert_same_bits(out, merged[t])


def test_norms_do_not_cancel() -> None:
    """An adapter that takes nearly all of a row away: the Gram identity in float32 has no digit left there."""
    left, right = weights(20, 2), weights(2, 300, seed=1)
    base = -(left @ right) + 1e-4 * weights(20, 300, seed=2)
    exact = torch.linalg.vector_norm(base.double() + left.double() @ right.double(), dim=1)
    direct = taskloom.lowrank_norm(base, right, left)
    gram = (base.square().sum(1) + 2 * ((base @ right.T) * left).sum(1) + ((left @ (right @ right.T)) * left).sum(1)).clamp(min=0).sqrt()
    assert ((direct - exact) / exact).abs().max() < 1e-3
    assert ((gram - exact) / exact).abs().max() > 0.1


def test_norms_are_the_gram_identity() -> None:
    base, right, left = weights(20, 300, dtype=F64), weights(2, 300, seed=1, dtype=F64), weights(20, 2, seed=2, dtype=F64)
    product = (base @ right.T * left).sum(1)
    gram = base.square().sum(1) + 2 * 0.3 * product + 0.09 * ((left @ (right @ right.T)) * left).sum(1)
    torch.testing.assert_close(taskloom.lowrank_norm(base, right, left, 0.3), gram.sqrt(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora(dtype: torch.dtype) -> None:
    base, right, left = weights(20, 30, dtype=dtype), weights(4, 30, seed=1), weights(20, 4, seed=2)
    magnitude = weights(20, seed=3).abs() + 0.5
    merged = taskloom.dora_merge(base, right, left, magnitude, scale=0.25)
    dense = base.double() + 0.25 * (left.double() @ right.double())
    assert_close(merged, (magnitude.double()[:, None] * dense / dense.norm(dim=1, keepdim=True)).to(dtype))
    with taskloom.backend("reference"):
        assert_close(merged, taskloom.dora_merge(base, right, left, magnitude, scale=0.25))
    untouched = taskloom.dora_merge(base.float(), right, torch.zeros(20, 4), base.float().norm(dim=1))
    torch.testing.assert_close(untouched, base.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_dora_takes_its_norm_for_a_constant(backend: str) -> None:
    leaves = [one.requires_grad_() for one in (weights(6, 7, dtype=F64), weights(2, 7, dtype=F64), weights(6, 2, dtype=F64))]
    magnitude = (weights(6, dtype=F64).abs() + 1).requires_grad_()
    with taskloom.backend(backend):
        loss = taskloom.dora_merge(*leaves, magnitude, 0.5).square().sum()
        found = torch.autograd.grad(loss, [*leaves, magnitude])
    base, right, left = leaves
    dense = base + 0.5 * left @ right
    expected = torch.autograd.grad(
        (magnitude[:, None] * dense / dense.norm(dim=1, keepdim=True).detach()).square().sum(), [*leaves, magnitude]
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_transforms() -> None:
    base, (right, left) = weights(5, 6), factors(5, 6, [2])

    def loss(weight: Tensor) -> Tensor:
        return taskloom.lowrank_merge(base, right, left, weight).square().sum()

    weight = torch.tensor([0.5])
    expected = torch.func.grad(loss)(weight)
    leaf = weight.clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(expected, leaf.grad, rtol=1e-4, atol=1e-4)
    _, tangent = torch.func.jvp(loss, (weight,), (torch.ones(1),))
    torch.testing.assert_close(tangent, expected[0], rtol=1e-4, atol=1e-4)
    many = torch.func.vmap(loss)(torch.tensor([[0.5], [1.0]]))
    assert torch.allclose(many[0], loss(weight))


def test_compiled() -> None:
    def loss(base: Tensor, a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
        merged = taskloom.lowrank_merge(base, [a, a], [b, 2 * b], weight, scale=0.5)
        return merged.square().sum() + taskloom.lowrank_norm(base, a.detach(), b.detach()).sum()

    run = compiled(loss)
    for rows, columns in ((20, 30), (44, 17)):
        gradients = []
        for function in (run, loss):
            leaves = [one.requires_grad_() for one in (weights(3, columns), weights(rows, 3), weights(2))]
            gradients.append(torch.autograd.grad(function(weights(rows, columns), *leaves), leaves))
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_compiled_in_place() -> None:
    def step(target: Tensor, a: Tensor, b: Tensor) -> Tensor:
        taskloom.lowrank_merge_(target, a, b, 0.5)
        return target * 2

    target, a, b = weights(6, 7), weights(2, 7), weights(6, 2)
    expected = 2 * taskloom.lowrank_merge(target, a, b, 0.5)
    assert_same_bits(compiled(step)(target, a, b), expected)
    assert_same_bits(2 * target, expected)


def test_a_changed_weight_is_noticed_by_autograd() -> None:
    leaf, target = weights(6, 7).requires_grad_(), weights(6, 7)
    product = (leaf * target).sum()
    taskloom.lowrank_merge_(target, *factors(6, 7, [2]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


BASE, A, B = torch.zeros(4, 5), torch.zeros(2, 5), torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: taskloom.lowrank_merge(torch.zeros(4), A, B),
            ValueError,
            r"lowrank_merge: base: expected two dimensions, got shape \(4,\)",
        ),
        (lambda: taskloom.lowrank_merge(BASE.long(), A, B), TypeError, "lowrank_merge: base: expected float32"),
        (lambda: taskloom.lowrank_merge(BASE, A.byte(), B), TypeError, "lowrank_merge: A: expected float32.*got torch.uint8"),
        (lambda: taskloom.lowrank_merge(BASE, [A], [B, B]), ValueError, "lowrank_merge: B: expected 1 factors as A, got 2"),
        (
            lambda: taskloom.lowrank_merge(BASE, [A, A[:, 1:]], [B, B]),
            ValueError,
            r"A\[1\]: expected shape \(r, 5\) for base \(4, 5\), got \(2, 4\)",
        ),
        (lambda: taskloom.lowrank_merge(BASE, A, B[:, :1]), ValueError, r"B: expected shape \(4, 2\) for A of rank 2, got \(4, 1\)"),
        (
            lambda: taskloom.lowrank_merge(BASE, A, B, [1.0, 2.0]),
            ValueError,
            "weight: expected one number or one for each of 1 adapters, got 2",
        ),
        (lambda: taskloom.lowrank_merge(BASE, A, B, torch.ones(2)), ValueError, r"weight: expected shape \(\) or \(1,\)"),
        (lambda: taskloom.lowrank_merge(BASE, A, B, torch.ones(1).long()), TypeError, "weight: expected float32"),
        (lambda: taskloom.lowrank_merge(BASE, A, B, scale=[torch.ones(())]), TypeError, "scale: expected numbers, got Tensor"),
        (lambda: taskloom.lowrank_merge(BASE, None, B), TypeError, "A: expected a tensor or a sequence of tensors, got NoneType"),
        (lambda: taskloom.lowrank_merge(BASE, A, B, None), TypeError, "weight: expected a number or a sequence of numbers, got NoneType"),
        (lambda: taskloom.lowrank_merge(BASE, A, B, scale=torch.ones(())), TypeError, "scale: expected a number or .*, got Tensor"),
        (
            lambda: taskloom.lowrank_unmerge_(BASE, A, B, torch.ones(())),
            TypeError,
            "lowrank_unmerge_: weight: expected a number .*got Tensor",
        ),
        (
            lambda: taskloom.lowrank_unmerge_(BASE[:1].expand(4, 5), A, B, base=BASE + 1),
            ValueError,
            "lowrank_unmerge_: target: expected a tensor that can be written to",
        ),
        (
            lambda: taskloom.lowrank_merge_tasks(BASE, A[None], B[None], select=0.0, out=BASE),
            TypeError,
            "select: expected an integer, got float",
        ),
        (lambda: taskloom.lowrank_merge(BASE, A, B, row_scale=torch.ones(5)), ValueError, r"row_scale: expected shape \(4,\)"),
        (lambda: taskloom.lowrank_merge_(BASE[:1].expand(4, 5), A, B), ValueError, "target: expected a tensor that can be written to"),
        (lambda: taskloom.lowrank_merge_(BASE, A, B, base=BASE.T), ValueError, r"base: expected shape \(4, 5\) as target, got \(5, 4\)"),
        (
            lambda: taskloom.lowrank_merge_(BASE, A, B.clone().requires_grad_()),
            RuntimeError,
            r"lowrank_merge_: B\[0\] requires grad and the op is in place; .* lowrank_merge",
        ),
        (lambda: taskloom.lowrank_unmerge_(BASE, A, B, base=BASE[1:]), ValueError, r"lowrank_unmerge_: base: expected shape \(4, 5\)"),
        (
            lambda: taskloom.lowrank_merge_tasks(BASE, A, B[None]),
            ValueError,
            r"A: expected shape \(T, r, 5\) for base \(4, 5\), got \(2, 5\)",
        ),
        (lambda: taskloom.lowrank_merge_tasks(BASE, A[None], B[None, :, :1]), ValueError, r"B: expected shape \(1, 4, 2\)"),
        (
            lambda: taskloom.lowrank_merge_tasks(BASE, A[None], B[None], select=1, out=BASE),
            ValueError,
            "select: expected .* 1 adapters, got 1",
        ),
        (lambda: taskloom.lowrank_merge_tasks(BASE, A[None], B[None], select=0), ValueError, "select and out: expected both or neither"),
        (lambda: taskloom.dora_merge(BASE, A, B, torch.ones(5)), ValueError, r"dora_merge: magnitude: expected shape \(4,\)"),
        (
            lambda: taskloom.dora_merge(BASE, [A, A], [B, B], torch.ones(4)),
            ValueError,
            "dora_merge: A: expected the factor of one adapter, got 2",
        ),
    ],
)
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    before = BASE.clone()
    with pytest.raises(error, match=message):
        call()
    assert BASE.equal(before)

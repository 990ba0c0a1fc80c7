"""lowrank_apply beyond its contract: mixed batches, coefficients, derivatives, errors, compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases_lowrank_apply import adapters, random_tasks
from compiled import compiled
from contract import assert_close, assert_same_bits
from samples import weights
from torch import Tensor

import taskloom

F64 = torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_of_zeros_leave_the_base_layer(dtype: torch.dtype) -> None:
    x, base, bias = weights(9, 13, dtype=dtype), weights(7, 13, seed=1, dtype=dtype), weights(7, seed=2, dtype=dtype)
    A, B = adapters(3, 13, 7, 4)
    plain = torch.nn.functional.linear(x, base, bias)
    for task in (random_tasks(9, tasks=3), None):
        assert_same_bits(taskloom.lowrank_apply(x, A, torch.zeros_like(B), 1.0, task, base, bias), plain)
    task = torch.tensor([-1, 0, -1, 1, -7, 2, 2, 1, 0])
    y = taskloom.lowrank_apply(x, A, B, 1.0, task, base, bias)
    assert_same_bits(y[task < 0], plain[task < 0])
    assert not y[task >= 0].equal(plain[task >= 0])


def test_is_what_merged_weights_give() -> None:
    x, base, (A, B), weight = weights(24, 40), weights(30, 40, seed=5), adapters(4, 40, 30, 3), torch.tensor([0.5, 1.0, -2.0, 0.1])
    task = random_tasks(24, tasks=4)
    y = taskloom.lowrank_apply(x, A, B, weight, task, base)
    merged = taskloom.lowrank_merge_tasks(base, A, B, weight)
    for row, one in enumerate(task.tolist()):
        expected = (base if one < 0 else merged[one]) @ x[row]
        torch.testing.assert_close(y[row], expected, rtol=1e-4, atol=1e-5)
    together = taskloom.lowrank_merge(base, list(A), list(B), weight)
    torch.testing.assert_close(taskloom.lowrank_apply(x, A, B, weight, None, base), x @ together.T, rtol=1e-4, atol=1e-4)


def test_rows_may_come_in_any_order() -> None:
    x, (A, B), task = weights(50, 20), adapters(3, 20, 10, 2), random_tasks(50, tasks=3)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    y = taskloom.lowrank_apply(x, A, B, 1.0, task)
    torch.testing.assert_close(taskloom.lowrank_apply(x[order], A, B, 1.0, task[order]), y[order], rtol=1e-5, atol=1e-6)


def test_tasks_of_sequences() -> None:
    x, (A, B) = weights(3, 5, 20), adapters(2, 20, 10, 2)
    task = torch.tensor([1, -1, 0])
    y = taskloom.lowrank_apply(x, A, B, 1.0, task)
    assert y.shape == (3, 5, 10)
    rows = taskloom.lowrank_apply(x.reshape(15, 20), A, B, 1.0, task.repeat_interleave(5))
    assert_same_bits(y.reshape(15, 10), rows)
    assert taskloom.lowrank_apply(x[0, 0], A, B).shape == (10,)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_tasks_of_any_integer_type(dtype: torch.dtype) -> None:
    x, (A, B) = weights(4, 20), adapters(3, 20, 10, 2)
    task = torch.tensor([2, 0, 1, 2])
    assert_same_bits(taskloom.lowrank_apply(x, A, B, task=task.to(dtype)), taskloom.lowrank_apply(x, A, B, task=task))


@pytest.mark.parametrize("grouped", [True, False])
def test_gradients(grouped: bool) -> None:
    leaves = [weights(5, 4, dtype=F64), *adapters(3, 4, 3, 2, F64), weights(3, seed=3, dtype=F64), weights(3, 4, seed=4, dtype=F64)]
    given = [one.requires_grad_() for one in (*leaves, weights(3, seed=5, dtype=F64))]
    task = torch.tensor([2, 0, -1, 2, 0]) if grouped else None

    def apply(x: Tensor, A: Tensor, B: Tensor, weight: Tensor, base: Tensor, bias: Tensor) -> Tensor:
        return taskloom.lowrank_apply(x, A, B, weight, task, base, bias, scale=0.5)

    with taskloom.backend("native"):
        assert torch.autograd.gradcheck(apply, given)
    with taskloom.backend("reference"):
        assert torch.autograd.gradgradcheck(apply, given)


def test_gradients_only_where_needed() -> None:
    x, (A, B), base = weights(8, 6), adapters(3, 6, 5, 2), weights(5, 6, seed=8)
    weight = torch.ones(3, requires_grad=True)
    taskloom.lowrank_apply(x, A, B, weight, None, base).square().sum().backward()
    assert weight.grad is not None
    expected = [
        2 * (taskloom.lowrank_apply(x, A, B, 1.0, None, base) * taskloom.lowrank_apply(x, A[t : t + 1], B[t : t + 1])).sum()
        for t in range(3)
    ]
    torch.testing.assert_close(weight.grad, torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert all(one.grad is None for one in (x, A, B, base))


def test_gradients_of_adapters_that_no_row_takes_are_zero() -> None:
    x, (A, B) = weights(4, 6), adapters(3, 6, 5, 2)
    leaves = [one.requires_grad_() for one in (A, B)]
    found = torch.autograd.grad(taskloom.lowrank_apply(x, A, B, 1.0, torch.tensor([1, 1, -1, 1])).sum(), leaves)
    for gradient in found:
        assert gradient[1].any()
        assert not gradient[[0, 2]].any()


def test_lists_of_ranks() -> None:
    x, task = weights(6, 7), random_tasks(6, tasks=3)
    A = [weights(rank, 7, seed=rank).requires_grad_() for rank in (2, 4, 1)]
    B = [weights(5, rank, seed=9 + rank) for rank in (2, 4, 1)]
    y = taskloom.lowrank_apply(x, A, B, [0.5, 1.0, 2.0], task)
    for row, t in enumerate(task.tolist()):
        expected = torch.zeros(5) if t < 0 else (0.5, 1.0, 2.0)[t] * (B[t] @ (A[t] @ x[row]))
        torch.testing.assert_close(y[row], expected, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert [one.grad.shape for one in A if one.grad is not None] == [one.shape for one in A]


def test_no_factor_is_gathered_per_row() -> None:
    x, (A, B), task = weights(400, 64), adapters(2, 64, 48, 8), random_tasks(400, tasks=2)
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            sizes.extend(one.numel() for one in torch.utils._pytree.tree_leaves(result) if isinstance(one, Tensor))
            return result

    leaves = [one.requires_grad_() for one in (x, A, B)]
    with Sizes():
        torch.autograd.grad(taskloom.lowrank_apply(x, A, B, 1.0, task).sum(), leaves)
    assert max(sizes) <= 400 * 64


def test_transforms() -> None:
    x, (A, B), task = weights(5, 6), adapters(2, 6, 4, 3), torch.tensor([0, 1, 1, -1, 0])

    def loss(A: Tensor) -> Tensor:
        return taskloom.lowrank_apply(x, A, B, 1.0, task).square().sum()

    leaf = A.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(A), expected, rtol=1e-4, atol=1e-5)
    _, tangent = torch.func.jvp(loss, (A,), (torch.ones_like(A),))
    torch.testing.assert_close(tangent, expected.sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grouped", [True, False])
def test_compiled(grouped: bool) -> None:
    def loss(x: Tensor, A: Tensor, B: Tensor, weight: Tensor, base: Tensor, task: Tensor) -> Tensor:
        return taskloom.lowrank_apply(x, A, B, weight, task if grouped else None, base).square().sum()

    run = compiled(loss)
    for rows in (12, 23):
        gradients = []
        task = random_tasks(rows, tasks=3)
        for function in (run, loss):
            leaves = [one.requires_grad_() for one in (weights(rows, 7), *adapters(3, 7, 5, 2), weights(3, seed=3), weights(5, 7, seed=5))]
            gradients.append(torch.autograd.grad(function(*leaves, task), leaves))
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


X, A, B = torch.zeros(3, 5), torch.zeros(2, 4, 5), torch.zeros(2, 6, 4)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X.long(), A, B), TypeError, "x: expected float32"),
        ((X, A[0], B), ValueError, r"A: expected shape \(T, r, 5\) for x \(3, 5\), got \(4, 5\)"),
        ((X, A, B[:1]), ValueError, r"B: expected shape \(2, out, 4\) for A \(2, 4, 5\), got \(1, 6, 4\)"),
        ((X, A, B, [1.0]), ValueError, "weight: expected one number or one for each of 2 adapters, got 1"),
        ((X, A, B, 1.0, torch.tensor([0, 1, 2])), ValueError, "task: expected values below 2, the number of adapters, got 2"),
        ((X, A, B, 1.0, torch.zeros(3)), TypeError, "task: expected a tensor of integers, got torch.float32"),
        ((X, A, B, 1.0, [0, 1, 1]), TypeError, "task: expected a tensor of integers, got list"),
        ((X, A, B, 1.0, torch.tensor([0, 1])), ValueError, r"task: expected shape \(3,\) or a first part of it, as x has rows, got \(2,\)"),
        ((X, A, B, 1.0, None, torch.zeros(5, 6)), ValueError, r"base: expected shape \(6, 5\)"),
        ((X, A, B, 1.0, None, torch.zeros(6, 5).half()), TypeError, "base: expected torch.float32 as x, got torch.float16"),
        ((X, A, B, 1.0, None, None, torch.zeros(5)), ValueError, r"bias: expected shape \(6,\)"),
        (
            (X, [A[0], A[0][:, :4]], list(B)),
            ValueError,
            r"A\[1\]: expected torch.float32 and the shape of A\[0\] \(4, 5\) but for the rank",
        ),
        ((X, [], []), ValueError, "A: expected at least one factor, got none"),
    ],
)
def test_errors(backend: str, arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    call: Callable[..., Any] = taskloom.lowrank_apply
    with taskloom.backend(backend), pytest.raises(error, match=f"lowrank_apply: {message}"):
        call(*arguments)


def test_half_precision_rounds_the_adapters_part_once() -> None:
    x, base, (A, B) = (
        weights(30, 40, dtype=torch.bfloat16),
        weights(20, 40, seed=1, dtype=torch.bfloat16),
        adapters(2, 40, 20, 4, torch.bfloat16),
    )
    task = random_tasks(30, tasks=2, lowest=0)
    start = torch.nn.functional.linear(x, base)
    inner = torch.einsum("ni,nri->nr", x.double(), A[task].double())
    exact = start.double() + torch.einsum("nr,nor->no", inner, B[task].double())
    y = taskloom.lowrank_apply(x, A, B, 1.0, task, base)
    assert (y != exact.float().bfloat16()).float().mean() < 1e-2
    assert_close(y, exact.bfloat16())

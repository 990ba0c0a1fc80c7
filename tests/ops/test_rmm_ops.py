"""What the ops of reversible merging promise beyond their contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases_rmm import parts
from samples import normal
from torch import Tensor

import taskloom


def _error(got: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm(got.double() - expected.double()) / torch.linalg.vector_norm(expected.double()))


def _restored(vectors: Tensor, rank: int, center: bool = True) -> Tensor:
    mean, basis, coefficients = taskloom.rmm_fit(vectors, rank, center)
    return torch.stack([taskloom.rmm_reconstruct(mean, basis, one) for one in coefficients])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("tasks", "width"), [(2, 16), (8, 16), (5, 4), (9, 8), (17, 16), (20, 7), (33, 40)])
def test_every_direction_is_exact(tasks: int, width: int, dtype: torch.dtype, bound: float) -> None:
    vectors = normal(tasks, 21, width, dtype=torch.float64).to(dtype)
    assert _error(_restored(vectors, min(width, tasks - 1)), vectors) <= bound


@pytest.mark.parametrize(("tasks", "width"), [(8, 16), (16, 8)])
def test_exact_where_directions_are_of_very_different_lengths(tasks: int, width: int) -> None:
    lengths = 10.0 ** -torch.arange(width, dtype=torch.float64)
    vectors = normal(tasks, 9, width, dtype=torch.float64) * lengths
    rank = min(width, tasks - 1)
    assert _error(_restored(vectors, rank), vectors) <= 1e-12
    _, basis, _ = taskloom.rmm_fit(vectors, rank)
    kept = basis.square().sum(2) > 0.5
    identity = torch.diag_embed(kept.double())
    assert float((basis @ basis.mT - identity).abs().max()) <= 1e-12


@pytest.mark.parametrize("length", [1e-140, 1e-100, 1e100, 1e140])
@pytest.mark.parametrize(("tasks", "width"), [(5, 9), (9, 5)])
def test_exact_at_any_length(tasks: int, width: int, length: float) -> None:
    vectors = normal(tasks, 9, width, dtype=torch.float64)
    mean, basis, coefficients = taskloom.rmm_fit(length * vectors, min(width, tasks - 1))
    restored = mean[:, None] + coefficients.transpose(0, 1) @ basis
    # The length is divided out: its square is near the ends of the range.
    assert _error(restored.transpose(0, 1) / length, vectors) <= 1e-12
    rank = 2
    _, basis, _ = taskloom.rmm_fit(length * vectors, rank)
    assert _error(basis.abs(), taskloom.rmm_fit(vectors, rank)[1].abs()) <= 1e-10


@pytest.mark.parametrize(("tasks", "width"), [(8, 16), (9, 5), (6, 6)])
def test_squared_error_is_that_of_the_singular_values_left_out(tasks: int, width: int) -> None:
    vectors = normal(tasks, 30, width)
    values = torch.linalg.svdvals((vectors - vectors.mean(0)).double().transpose(0, 1))
    before = float("inf")
    for rank in range(1, min(width, tasks - 1)):
        error = float((_restored(vectors, rank).double() - vectors.double()).square().sum())
        assert error == pytest.approx(float(values[:, rank:].square().sum()), rel=1e-4)
        assert error <= before
        before = error


@pytest.mark.parametrize(("tasks", "width"), [(8, 16), (9, 5)])
def test_bases_are_orthonormal_signed_and_coefficients_sum_to_nothing(tasks: int, width: int) -> None:
    _, basis, coefficients = taskloom.rmm_fit(normal(tasks, 30, width), 3)
    assert float((basis @ basis.mT - torch.eye(3)).abs().max()) <= 1e-5
    assert float(coefficients.sum(0).abs().max()) <= 1e-5
    assert (basis.gather(2, basis.abs().argmax(2, keepdim=True)) > 0).all()
    lengths = coefficients.square().sum(0)
    assert (lengths[:, :-1] >= lengths[:, 1:]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tasks", [3, 9])
def test_equal_tasks_have_no_direction(tasks: int, dtype: torch.dtype) -> None:
    one = normal(13, 5, dtype=dtype)
    mean, basis, coefficients = taskloom.rmm_fit(one.expand(tasks, 13, 5), 2)
    torch.testing.assert_close(mean, one)
    assert not basis.any()
    assert not coefficients.any()


def test_a_position_is_fitted_as_if_it_were_alone() -> None:
    vectors = normal(5, 19, 6)
    whole = taskloom.rmm_fit(vectors, 2)
    for position in (0, 7, 8, 18):
        alone = taskloom.rmm_fit(vectors[:, position : position + 1], 2)
        assert alone[0].equal(whole[0][position : position + 1])
        assert alone[1].equal(whole[1][position : position + 1])
        assert alone[2].equal(whole[2][:, position : position + 1])


def test_a_fit_has_no_gradient() -> None:
    mean, _, _ = taskloom.rmm_fit(normal(3, 4, 5).requires_grad_(), 1)
    with pytest.raises(RuntimeError, match="rmm_fit has no gradient"):
        mean.sum().backward()


def test_reconstruction_has_gradients() -> None:
    mean, basis, coefficients = (part.requires_grad_() for part in parts(5, 4, 3, 1, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda m, w, a: taskloom.rmm_reconstruct(m, w, a[0]), (mean, basis, coefficients))


def _batch(rows: int = 12, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, list[Tensor]]:
    task = torch.arange(rows) * 5 % 3
    return normal(rows, 7, dtype=dtype), task, [*parts(6, 4, 2, 3, 1, dtype), *parts(7, 4, 3, 3, 9, dtype)]


def _adapter(rest: list[Tensor], task: int) -> tuple[Tensor, Tensor]:
    return taskloom.rmm_reconstruct(*rest[:2], rest[2][task]), taskloom.rmm_reconstruct(*rest[3:5], rest[5][task]).T


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-13)])
def test_a_mixed_batch_is_each_task_alone(dtype: torch.dtype, bound: float) -> None:
    x, task, rest = _batch(dtype=dtype)
    y = taskloom.rmm_linear(x, task, *rest)
    for place in range(3):
        a, b = _adapter(rest, place)
        assert _error(y[task == place], x[task == place] @ (a @ b).T) <= bound
    order = torch.tensor([2, 0, 1])
    permuted = [part[order] if place % 3 == 2 else part for place, part in enumerate(rest)]
    assert _error(taskloom.rmm_linear(x, order.argsort()[task], *permuted), y) <= bound


def test_mixed_batches_have_gradients() -> None:
    x, task, rest = _batch(5)
    leaves = [one.requires_grad_() for one in (x, *rest)]
    assert torch.autograd.gradcheck(lambda x, *rest: taskloom.rmm_linear(x, task, *rest), leaves)


def test_gradients_of_coefficients_are_those_of_each_task_alone() -> None:
    x, task, rest = _batch()
    for place in (2, 5):
        rest[place].requires_grad_()
    direction = normal(12, 6, dtype=torch.float64)
    got = torch.autograd.grad((taskloom.rmm_linear(x, task, *rest) * direction).sum(), (rest[2], rest[5]))
    total = torch.zeros((), dtype=torch.float64)
    for place in range(3):
        a, b = _adapter(rest, place)
        total = total + ((x[task == place] @ b.T @ a.T) * direction[task == place]).sum()
    for ours, expected in zip(got, torch.autograd.grad(total, (rest[2], rest[5])), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("wrong", [-1, 3])
def test_a_task_that_is_none_is_named(backend: str, wrong: int) -> None:
    x, task, rest = _batch()
    task[4] = wrong
    with taskloom.backend(backend), pytest.raises(ValueError, match=f"rmm_linear: task: expected 0 to 2, got {wrong} at row 4"):
        taskloom.rmm_linear(x, task, *rest)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(3, 4), 1), ValueError, r"vectors: expected shape \[n, P, r\], got \(3, 4\)"),
        ((torch.ones(3, 4, 5, dtype=torch.int64), 1), TypeError, r"vectors: expected float32, .*, got torch\.int64"),
        ((torch.ones(3, 4, 5), 0), ValueError, r"rank: expected 1 to 2, .* 5 entries and one less than the tasks \(3\), got 0"),
        ((torch.ones(3, 4, 5), 3), ValueError, "rank: expected 1 to 2, .*, got 3"),
        ((torch.ones(3, 4, 5), 1.0), TypeError, "rank: expected an integer, got float"),
        ((torch.ones(3, 4, 5), True), TypeError, "rank: expected an integer, got bool"),
        ((torch.ones(3, 4, 5), 4, False), ValueError, r"rank: expected 1 to 3, .* and the tasks \(3\), got 4"),
    ],
)
def test_bad_fits(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"rmm_fit: {message}"):
        taskloom.rmm_fit(*arguments)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.ones(12, 8), "mean_b: expected 8 positions as x has columns, got 7"),
        (0, torch.ones(7), r"x: expected shape \[N, d\]"),
        (1, torch.zeros(3, dtype=torch.int64), r"task: expected shape \(12,\), one for each row of x, got \(3,\)"),
        (3, torch.ones(6, 2, 5), r"basis_a: expected shape \[6, p, 4\] as mean_a, got \(6, 2, 5\)"),
        (4, torch.ones(3, 6, 1), r"coef_a: expected last dimensions \(6, 2\) as basis_a, got \(3, 6, 1\)"),
        (4, torch.ones(6, 2), r"coef_a: expected shape \[n, P, p\]"),
        (4, torch.ones(2, 6, 2), "coef_b: expected tasks 2 as coef_a, got 3"),
    ],
)
def test_bad_batches(place: int, value: Tensor, message: str) -> None:
    x, task, rest = _batch()
    arguments: list[Any] = [x, task, *rest]
    arguments[place] = value
    with pytest.raises(ValueError, match=f"rmm_linear: {message}"):
        taskloom.rmm_linear(*arguments)


def test_other_bad_input() -> None:
    x, task, rest = _batch()
    with pytest.raises(TypeError, match=r"task: expected int64 or int32, got torch\.float32"):
        taskloom.rmm_linear(x, task.float(), *rest)
    mean, basis, coefficients = parts(5, 4, 3, 1)
    with pytest.raises(ValueError, match=r"rmm_reconstruct: coefficients: expected one task's, shape \(5, 3\), got \(1, 5, 3\)"):
        taskloom.rmm_reconstruct(mean, basis, coefficients)

"""block_scale_merge beyond its contract: properties, errors, derivatives, compilation."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from cases_block_scale_merge import random_partition
from compiled import compiled
from contract import assert_close, assert_same_bits
from samples import weights

import taskloom
from taskloom import _native
from taskloom.ops import _library
from taskloom.ops.masked import block_scale_merge_backward

SHAPES = ((17, 31), (9,), (5, 2, 3))
GROUPS = 10


def _blocks(seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[torch.Tensor]:
    return [weights(*shape, seed=seed + place, dtype=dtype, scale=scale) for place, shape in enumerate(SHAPES)]


def _pool(tasks: int = 3, dtype: torch.dtype = torch.float32) -> list[list[torch.Tensor]]:
    return [_blocks(10 * (task + 1), dtype, scale=0.1) for task in range(tasks)]


def _partition(groups: int = GROUPS) -> list[torch.Tensor]:
    return [random_partition(*shape, groups=groups, seed=place) for place, shape in enumerate(SHAPES)]


def test_zero_coefficients_give_the_base() -> None:
    base = _blocks(0)
    for got, expected in zip(taskloom.block_scale_merge(base, _pool(), torch.zeros(3, 3)), base, strict=True):
        assert_same_bits(got, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.float32, 1e-7)])
def test_one_hot_coefficients_give_a_task(dtype: torch.dtype, tolerance: float) -> None:
    base, tuned = _blocks(0), _blocks(30)
    deltas = [[(one - origin).to(dtype) for one, origin in zip(model, base, strict=True)] for model in (_blocks(20), tuned)]
    coef = torch.tensor([[0.0] * 3, [1.0] * 3])
    for got, expected in zip(taskloom.block_scale_merge(base, deltas, coef), tuned, strict=True):
        assert torch.linalg.vector_norm(got - expected) <= tolerance * torch.linalg.vector_norm(expected)


def test_equal_blocks_give_task_arithmetic() -> None:
    base, deltas, coef = _blocks(0), _pool(), torch.tensor([0.3, -0.2, 0.9])
    merged = taskloom.block_scale_merge(base, deltas, coef[:, None].expand(3, 3))
    for b, got in enumerate(merged):
        tuned = [base[b] + task[b] for task in deltas]
        total = sum((float(coef[t]) * (one.double() - base[b]) for t, one in enumerate(tuned)), base[b].double())
        assert_close(got, total.float())


def test_one_group_is_no_partition() -> None:
    base, deltas, coef = _blocks(0), _pool(), weights(3, 3)
    plain = taskloom.block_scale_merge(base, deltas, coef)
    for got, expected in zip(taskloom.block_scale_merge(base, deltas, coef[..., None], _partition(1)), plain, strict=True):
        assert_same_bits(got, expected)
    spread = coef[..., None].expand(3, 3, GROUPS)
    for got, expected in zip(taskloom.block_scale_merge(base, deltas, spread, _partition()), plain, strict=True):
        assert_same_bits(got, expected)


def test_coefficient_gradient_is_an_inner_product() -> None:
    base, deltas, coef = _blocks(0), _pool(dtype=torch.float16), weights(3, 3).requires_grad_()
    merged = taskloom.block_scale_merge(base, deltas, coef)
    (gradient,) = torch.autograd.grad(sum(one.square().sum() for one in merged), coef)
    merged = [one.detach() for one in merged]
    expected = [[float((2 * one.double() * task[b].double()).sum()) for b, one in enumerate(merged)] for task in deltas]
    assert torch.allclose(gradient.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_group_gradients_sum_to_the_blocks() -> None:
    gradients, deltas = _blocks(0), _pool()
    grouped = block_scale_merge_backward(gradients, deltas, _partition(), GROUPS)
    assert torch.allclose(grouped.sum(2, keepdim=True), block_scale_merge_backward(gradients, deltas), rtol=1e-12)


def test_a_single_tensor_takes_short_coefficients() -> None:
    base, deltas, coef = weights(50), [weights(50, seed=1), weights(50, seed=2)], torch.tensor([0.5, -2.0])
    (expected,) = taskloom.block_scale_merge([base], [[delta] for delta in deltas], coef[:, None])
    for shape in ((2,), (2, 1), (2, 1, 1)):
        got = taskloom.block_scale_merge(base, deltas, coef.reshape(shape))
        assert isinstance(got, torch.Tensor)
        assert_same_bits(got, expected)


def test_one_rounding() -> None:
    base, delta = weights(1000, dtype=torch.bfloat16), weights(1000, seed=1)
    coef = torch.tensor([0.3, 0.7])
    total = (coef[0] * delta) + coef[1] * (2 * delta)
    got = taskloom.block_scale_merge(base, [delta, 2 * delta], coef)
    assert torch.equal(got, (base.float() + total).bfloat16())


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_groups_are_checked(backend: str) -> None:
    part = torch.tensor([0, 1, 3], dtype=torch.uint8)
    with taskloom.backend(backend):
        with pytest.raises(ValueError, match=r"block_scale_merge: partition\[0\]: expected values below 3, .*, got 3"):
            taskloom.block_scale_merge(torch.zeros(3), [torch.zeros(3)], torch.zeros(1, 1, 3), part)
        with pytest.raises(ValueError, match=r"block_scale_merge_backward: partition\[0\]: expected values below 1, .*, got 3"):
            block_scale_merge_backward([torch.zeros(3)], [[torch.zeros(3)]], [part], 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], [[]], torch.zeros(1, 0)), ValueError, "base: expected at least one block"),
        ((torch.zeros(3), [], torch.zeros(0)), ValueError, "deltas: expected at least one task"),
        ((torch.zeros(3, dtype=torch.int8), [torch.zeros(3)], torch.zeros(1)), TypeError, r"base\[0\]: expected float32"),
        ((torch.zeros(3), [torch.zeros(2)], torch.zeros(1)), ValueError, r"deltas\[0\]\[0\]: expected shape \(3,\) as base\[0\]"),
        (([torch.zeros(3)] * 2, [[torch.zeros(3)]], torch.zeros(1, 2)), ValueError, r"deltas\[0\]: expected 2 blocks as base, got 1"),
        (([torch.zeros(3)], [torch.zeros(3)], torch.zeros(1, 1)), ValueError, r"deltas\[0\]: expected a sequence of 1 blocks"),
        ((torch.zeros(3), [torch.zeros(3)], torch.zeros(2)), ValueError, r"coef: expected shape \[1, 1\] or .*, got \(2,\)"),
        ((torch.zeros(3), [torch.zeros(3)], torch.zeros(1, 1, 2)), ValueError, "1 without a partition, got"),
        ((torch.zeros(3), [torch.zeros(3)], torch.zeros(1).half()), TypeError, "coef: expected float32 or float64"),
        ((torch.zeros(3), [torch.zeros(3)], torch.zeros(1), torch.zeros(3)), TypeError, r"partition\[0\]: expected torch.uint8"),
        ((torch.zeros(3), [torch.zeros(3)], torch.zeros(1), torch.zeros(4).byte()), ValueError, r"partition\[0\]: expected shape \(3,\)"),
    ],
)
def test_errors(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"block_scale_merge: .*{message}"):
        taskloom.block_scale_merge(*arguments)


@pytest.mark.parametrize("grouped", [True, False])
def test_gradients(grouped: bool) -> None:
    shapes = ((2, 2), (1,))
    partition = [random_partition(*shape, groups=3) for shape in shapes] if grouped else None
    tensors = [weights(*shape, seed=seed, dtype=torch.float64).requires_grad_() for seed, shape in enumerate(shapes * 3)]
    coef = weights(2, 2, 3 if grouped else 1, dtype=torch.float64, seed=9).requires_grad_()

    def merge(coef: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(taskloom.block_scale_merge(tensors[:2], [tensors[2:4], tensors[4:]], coef, partition))

    with taskloom.backend("native"):
        assert torch.autograd.gradcheck(merge, (coef, *tensors))
        assert torch.autograd.gradgradcheck(merge, (coef, *tensors))


@pytest.mark.parametrize("grouped", [True, False])
def test_gradients_of_the_coefficients_alone(grouped: bool) -> None:
    partition = [random_partition(*shape, groups=3) for shape in SHAPES] if grouped else None
    base, deltas = _blocks(0, torch.float64), _pool(2, torch.float64)
    coef = weights(2, 3, 3 if grouped else 1, dtype=torch.float64, seed=9).requires_grad_()

    def merge(coef: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(taskloom.block_scale_merge(base, deltas, coef, partition))

    with taskloom.backend("native"):
        assert torch.autograd.gradcheck(merge, (coef,))
        assert torch.autograd.gradgradcheck(merge, (coef,))
        slopes = [weights(*shape, dtype=torch.float64, seed=5) for shape in SHAPES]
        (alone,) = torch.autograd.grad(merge(coef), coef, slopes)
        base[1].requires_grad_()
        among, _ = torch.autograd.grad(merge(coef), (coef, base[1]), slopes)
    assert_same_bits(alone, among)


def test_a_changed_delta_is_noticed() -> None:
    base, deltas, coef = _blocks(0), _pool(2), weights(2, 3).requires_grad_()
    merged = taskloom.block_scale_merge(base, deltas, coef)
    deltas[1][0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(merged[0].sum(), coef)


@pytest.mark.usefixtures("restored_level")
@pytest.mark.parametrize("groups", [1, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_tasks_over_several_pieces(dtype: torch.dtype, groups: int) -> None:
    """More tasks than are read side by side, whose sums wait in memory; large blocks, and small ones that one thread takes together."""
    sizes = (40_000, 7, 0, 33_000, 129)
    base = [weights(size, seed=place) for place, size in enumerate(sizes)]
    deltas = [[weights(size, seed=100 * task + place, dtype=dtype) for place, size in enumerate(sizes)] for task in range(1, 15)]
    coef = weights(14, len(sizes), groups)
    partition = [random_partition(size, groups=groups, seed=size) for size in sizes]
    with taskloom.backend("reference"):
        expected = taskloom.block_scale_merge(base, deltas, coef, partition)
        products = block_scale_merge_backward(base, deltas, partition, groups)
    found = []
    for level in (level for level in _native.build_info()["levels"] if level <= _native.detected_cpu_level()):
        _library.force_cpu_level(level)
        for got, one in zip(taskloom.block_scale_merge(base, deltas, coef, partition), expected, strict=True):
            assert_same_bits(got, one)
        found.append(block_scale_merge_backward(base, deltas, partition, groups))
        assert torch.allclose(found[-1], products, rtol=1e-10, atol=1e-10)
        assert_same_bits(found[-1], found[0])


def test_products_gradients() -> None:
    shapes = ((2, 3), (4,))
    partition = [random_partition(*shape, groups=3) for shape in shapes]
    tensors = [weights(*shape, seed=seed, dtype=torch.float64).requires_grad_() for seed, shape in enumerate(shapes * 2)]
    with taskloom.backend("native"):
        assert torch.autograd.gradcheck(lambda *args: block_scale_merge_backward(args[:2], [args[2:]], partition, 3), tensors)


def test_gradients_only_where_needed() -> None:
    base, deltas, coef = _blocks(0), _pool(2, torch.float16), weights(2, 3).requires_grad_()
    deltas[1][2].requires_grad_()
    base[0].requires_grad_()
    merged = taskloom.block_scale_merge(base, deltas, coef)
    merged[2].sum().backward()
    assert base[0].grad is not None
    assert not base[0].grad.any()
    assert deltas[1][2].grad is not None
    assert deltas[1][2].grad.dtype == torch.float16
    assert torch.equal(deltas[1][2].grad, coef[1, 2].detach().expand(SHAPES[2]).half())
    assert all(one.grad is None for one in chain(base[1:], deltas[0], deltas[1][:2]))
    assert coef.grad is not None
    assert not coef.grad[:, :2].any()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_transforms() -> None:
    base, deltas, coef, partition = _blocks(0), _pool(), weights(3, 3, GROUPS), _partition()

    def loss(coef: torch.Tensor) -> torch.Tensor:
        return torch.stack([one.square().sum() for one in taskloom.block_scale_merge(base, deltas, coef, partition)]).sum()

    leaf = coef.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.allclose(torch.func.grad(loss)(coef), expected, rtol=1e-5, atol=1e-5)
    tangent = weights(3, 3, GROUPS, seed=1)
    _, derivative = torch.func.jvp(loss, (coef,), (tangent,))
    assert torch.allclose(derivative, (expected * tangent).sum(), rtol=1e-4)
    many = torch.stack([coef, tangent])
    losses = torch.func.vmap(loss)(many)
    assert torch.allclose(losses, torch.stack([loss(one) for one in many]), rtol=1e-5)


def test_compiled() -> None:
    def loss(base: torch.Tensor, delta: torch.Tensor, coef: torch.Tensor, partition: torch.Tensor) -> torch.Tensor:
        merged = taskloom.block_scale_merge([base, 2 * base], [[delta, delta]], coef, [partition, partition])
        return merged[0].sum() - merged[1].square().sum()

    run = compiled(loss)
    for size in (20, 44):
        tensors = weights(size), weights(size, seed=1)
        partition = random_partition(size, groups=3)
        gradients = []
        for function in (run, loss):
            coef = weights(1, 2, 3).requires_grad_()
            gradients.append(torch.autograd.grad(function(*tensors, coef, partition), coef)[0])
        assert torch.allclose(*gradients)

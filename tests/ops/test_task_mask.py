"""task_mask and multi_task_vector beyond their contracts: properties, errors, derivatives, compilation."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from compiled import compiled
from contract import assert_same_bits
from samples import awkward, moved, weights

import taskloom

SHAPE = (37, 29)


def _tasks(count: int = 4, density: float = 0.5) -> tuple[torch.Tensor, list[torch.Tensor]]:
    base = weights(*SHAPE)
    return base, [moved(base, seed, density) for seed in range(1, count + 1)]


def _mask(base: torch.Tensor, *args: Any) -> torch.Tensor:
    return taskloom.unpack_mask(taskloom.task_mask(base, *args), base.shape)


def test_one_task_needs_what_it_moved() -> None:
    base, (tuned,) = _tasks(1)
    total = taskloom.multi_task_vector(base, [tuned])
    assert torch.equal(_mask(base, tuned, total), total != 0)


@pytest.mark.parametrize("tall_mask_lambda", [0.01, 1.0, 50.0])
def test_disjoint_tasks_need_their_own_support(tall_mask_lambda: float) -> None:
    base = weights(*SHAPE)
    owner = torch.arange(base.numel()).reshape(SHAPE) % 4
    tasks = [torch.where(owner == task, base + 0.25, base) for task in range(3)]
    total = taskloom.multi_task_vector(base, tasks)
    for task, tuned in enumerate(tasks):
        assert torch.equal(_mask(base, tuned, total, tall_mask_lambda), owner == task)


def test_masks_shrink_as_lambda_grows() -> None:
    base, tasks = _tasks()
    total = taskloom.multi_task_vector(base, tasks)
    masks = [_mask(base, tasks[0], total, value) for value in (0.2, 0.3, 0.4, 0.5, 0.6, 1.0, 4.0)]
    for wider, narrower in pairwise(masks):
        assert not (narrower & ~wider).any()
    assert masks[0].sum() > masks[-1].sum() > 0


def test_comparison_is_strict_and_nan_is_unset() -> None:
    base, tuned, total = torch.zeros(4), torch.tensor([1.0, 1.0, 0.0, float("nan")]), torch.tensor([2.0, 1.999, 0.0, 1.0])
    assert _mask(base, tuned, total, 1.0).tolist() == [False, True, False, False]


def test_bfloat16_weights_are_subtracted_in_float32() -> None:
    base = weights(4096, dtype=torch.bfloat16)
    tuned = moved(base, 1)
    assert torch.equal(taskloom.multi_task_vector(base, [tuned]), tuned.float() - base.float())


def test_sum_of_awkward_values_is_the_references() -> None:
    base, tuned = awkward().repeat(13), awkward().repeat_interleave(13)
    got = taskloom.multi_task_vector(base, [tuned, base], [1.0, 0.5])
    with taskloom.backend("reference"):
        expected = taskloom.multi_task_vector(base, [tuned, base], [1.0, 0.5])
    assert_same_bits(got.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"base": torch.zeros(3, dtype=torch.int32)}, TypeError, "task_mask: base: expected float32"),
        ({"tuned": torch.zeros(4)}, ValueError, r"task_mask: tuned: expected shape \(3,\) as base, got \(4,\)"),
        ({"multi_task_vector": torch.zeros(3, 1)}, ValueError, "task_mask: multi_task_vector: expected shape"),
        ({"tall_mask_lambda": 0.0}, ValueError, "tall_mask_lambda: expected a finite number > 0, got 0.0"),
        ({"tall_mask_lambda": float("nan")}, ValueError, "tall_mask_lambda: expected a finite number > 0, got nan"),
        ({"tall_mask_lambda": "0.4"}, TypeError, "tall_mask_lambda: expected a number, got str"),
    ],
)
def test_task_mask_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"base": torch.zeros(3), "tuned": torch.zeros(3), "multi_task_vector": torch.zeros(3)} | changes
    with pytest.raises(error, match=message):
        taskloom.task_mask(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3), []), ValueError, "multi_task_vector: tuned: expected at least one tensor"),
        ((torch.zeros(3), [torch.zeros(3), torch.zeros(2)]), ValueError, r"tuned\[1\]: expected shape \(3,\)"),
        ((torch.zeros(3), [torch.zeros(3, dtype=torch.int64)]), TypeError, r"tuned\[0\]: expected float32"),
        ((torch.zeros(3), [torch.zeros(3)], [1.0, 2.0]), ValueError, "weight: expected one number or one for each of 1 tasks, got 2"),
        (
            (torch.zeros(3), [torch.zeros(3)], torch.ones(1, requires_grad=True)),
            TypeError,
            "weight: expected a number, got a tensor that requires",
        ),
    ],
)
def test_multi_task_vector_errors(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        taskloom.multi_task_vector(*arguments)


def test_gradients() -> None:
    base, first, second = (weights(5, seed=seed, dtype=torch.float64).requires_grad_() for seed in range(3))

    def total(*args: torch.Tensor) -> torch.Tensor:
        return taskloom.multi_task_vector(args[0], args[1:], [0.5, -2.0])

    with taskloom.backend("native"):
        assert torch.autograd.gradcheck(total, (base, first, second))
        assert torch.autograd.gradgradcheck(total, (base, first, second))


def test_gradients_take_their_arguments_dtypes() -> None:
    base, tuned = weights(5).requires_grad_(), weights(5, seed=1, dtype=torch.bfloat16).requires_grad_()
    taskloom.multi_task_vector(base, [tuned, tuned], 0.5).sum().backward()
    assert base.grad is not None
    assert tuned.grad is not None
    assert base.grad.tolist() == [-1.0] * 5
    assert tuned.grad.dtype == torch.bfloat16
    assert tuned.grad.tolist() == [1.0] * 5


# torch scripts its own formulas at the first use of forward AD.
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_transforms() -> None:
    base, tuned, tangent = weights(5), weights(5, seed=1), weights(5, seed=2)
    total, derivative = torch.func.jvp(lambda one: taskloom.multi_task_vector(base, [one], 3.0), (tuned,), (tangent,))
    assert torch.equal(total, taskloom.multi_task_vector(base, [tuned], 3.0))
    assert torch.equal(derivative, 3 * tangent)
    many = torch.stack([moved(base, seed) for seed in range(3)])
    masks = torch.func.vmap(lambda one: taskloom.task_mask(base, one, tangent))(many)
    assert torch.equal(masks, torch.stack([taskloom.task_mask(base, one, tangent) for one in many]))


def test_compiled() -> None:
    def both(base: torch.Tensor, tuned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = taskloom.multi_task_vector(base, [tuned, base + 0.1], 0.5)
        return total, taskloom.task_mask(base, tuned, total)

    run = compiled(both)
    for size in (9, 25):
        base, tuned = weights(size), weights(size, seed=1)
        for got, expected in zip(run(base, tuned), both(base, tuned), strict=True):
            assert torch.equal(got, expected)

"""masked_update and masked_update_ beyond their contracts: untouched bits, overlap, errors, derivatives, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled import compiled
from contract import assert_same_bits
from samples import random_packed, weights

import taskloom

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _any_bits(count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    width = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (count * width,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5])
def test_unset_entries_keep_every_bit(dtype: torch.dtype, density: float) -> None:
    target, delta = _any_bits(3000, dtype), torch.full((3000,), float("nan"))
    packed = random_packed(3000, density=density)
    unset = ~taskloom.unpack_mask(packed, (3000,))
    for mask in (packed, ~unset):
        updated = taskloom.masked_update(target, mask, delta)
        assert_same_bits(updated[unset], target[unset])
        assert updated[~unset].isnan().all()
        changed = target.clone()
        assert taskloom.masked_update_(changed, mask, delta) is changed
        assert_same_bits(changed, updated)


@pytest.mark.parametrize("density", [0.02, 0.5])
def test_one_rounding(density: float) -> None:
    target, delta, packed = weights(4096, dtype=torch.bfloat16), weights(4096, seed=1), random_packed(4096, density=density)
    exact = (target.float() + torch.tensor(0.3) * delta).bfloat16()
    got = taskloom.masked_update(target, packed, delta, 0.3)
    assert_same_bits(got, torch.where(taskloom.unpack_mask(packed, (4096,)), exact, target))


def test_overlapping_arguments() -> None:
    memory, packed = weights(2000), random_packed(1990)
    for delta_at, target_at in ((0, 0), (0, 5), (5, 0)):
        ours = memory.clone()
        target, delta = ours[target_at : target_at + 1990], ours[delta_at : delta_at + 1990]
        expected = taskloom.masked_update(target, packed, delta.clone(), 0.5)
        taskloom.masked_update_(target, packed, delta, 0.5)
        assert torch.equal(target, expected)


def test_noncontiguous_target() -> None:
    memory = weights(40, 60)
    before, packed = memory.clone(), random_packed(600)
    target = memory.t()[::2, ::2]
    expected = taskloom.masked_update(target, packed, torch.ones(30, 20))
    taskloom.masked_update_(target, packed, torch.ones(30, 20))
    assert torch.equal(target, expected)
    assert torch.equal(memory[1::2], before[1::2])
    assert torch.equal(memory[:, 1::2], before[:, 1::2])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_expanded_target_is_refused(backend: str) -> None:
    target = torch.zeros(1).expand(8)
    with taskloom.backend(backend), pytest.raises(ValueError, match="masked_update_: target: expected a tensor that can be written to"):
        taskloom.masked_update_(target, random_packed(8), torch.ones(8))
    assert not target.any()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": torch.zeros(9, dtype=torch.int32)}, TypeError, "target: expected float32"),
        ({"delta": torch.zeros(8)}, ValueError, r"delta: expected shape \(9,\) as target, got \(8,\)"),
        ({"mask": torch.zeros(8, dtype=torch.bool)}, ValueError, r"mask: expected shape \(9,\) as target"),
        ({"mask": torch.zeros(1, dtype=torch.uint8)}, ValueError, r"mask: expected shape \(2,\)"),
        ({"mask": torch.zeros(9)}, TypeError, "mask: expected torch.bool or packed torch.uint8, got torch.float32"),
        ({"scale": torch.ones((), requires_grad=True)}, TypeError, "scale: expected a number, got a tensor that requires grad"),
    ],
)
def test_errors_leave_the_target(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"target": weights(9), "mask": torch.ones(9, dtype=torch.bool), "delta": weights(9)} | changes
    before = arguments["target"].clone()
    for name in ("masked_update", "masked_update_"):
        with pytest.raises(error, match=f"{name}: {message}"):
            getattr(taskloom, name)(**arguments)
    assert torch.equal(arguments["target"], before)


def test_in_place_refuses_what_requires_grad() -> None:
    mask = torch.ones(3, dtype=torch.bool)
    leaf = torch.zeros(3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"masked_update_: target requires grad.*masked_update where gradients must flow"):
        taskloom.masked_update_(leaf, mask, torch.ones(3))
    with pytest.raises(RuntimeError, match="masked_update_: delta requires grad"):
        taskloom.masked_update_(torch.zeros(3), mask, leaf)
    with torch.no_grad():
        taskloom.masked_update_(leaf, mask, torch.ones(3))
    assert leaf.tolist() == [1.0, 1.0, 1.0]


def test_backward_notices_the_change() -> None:
    weight, scale = torch.ones(3), torch.ones(3, requires_grad=True)
    product = (weight * scale).sum()
    taskloom.masked_update_(weight, torch.ones(3, dtype=torch.bool), torch.ones(3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("packs", [True, False])
def test_gradients(packs: bool) -> None:
    target, delta = (weights(3, 7, seed=seed, dtype=torch.float64).requires_grad_() for seed in range(2))
    packed = random_packed(21)
    mask = packed if packs else taskloom.unpack_mask(packed, (3, 7))
    with taskloom.backend("native"):
        assert torch.autograd.gradcheck(lambda *args: taskloom.masked_update(args[0], mask, args[1], -0.7), (target, delta))
        assert torch.autograd.gradgradcheck(lambda *args: taskloom.masked_update(args[0], mask, args[1], -0.7), (target, delta))


def test_gradients_take_their_arguments_dtypes() -> None:
    target, delta = weights(9).requires_grad_(), torch.full((9,), float("nan"), dtype=torch.float16, requires_grad=True)
    mask = torch.arange(9) % 2 == 0
    taskloom.masked_update(target, mask, delta, 0.5).sum().backward()
    assert target.grad is not None
    assert delta.grad is not None
    assert torch.equal(target.grad, torch.ones(9))
    assert torch.equal(delta.grad, 0.5 * mask.half())


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_transforms() -> None:
    target, delta, tangent, packed = weights(20), weights(20, seed=1), weights(20, seed=2), random_packed(20)
    mask = taskloom.unpack_mask(packed, (20,))
    _, derivative = torch.func.jvp(lambda one: taskloom.masked_update(target, packed, one, 3.0), (delta,), (tangent,))
    assert torch.equal(derivative, torch.where(mask, 3 * tangent, 0))
    many = torch.stack([delta, tangent])
    updated = torch.func.vmap(lambda one: taskloom.masked_update(target, packed, one))(many)
    assert torch.equal(updated, torch.stack([taskloom.masked_update(target, packed, one) for one in many]))
    with pytest.raises(RuntimeError, match=r"masked_update_ does not work under torch.func's vmap transform"):
        torch.func.vmap(lambda one: taskloom.masked_update_(one, packed, delta))(many)


def test_compiled() -> None:
    def both(target: torch.Tensor, packed: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        taskloom.masked_update_(target, packed, delta, 0.5)
        return taskloom.masked_update(target, packed, delta)

    run = compiled(both)
    for size in (20, 44):
        ours, theirs = weights(size), weights(size)
        arguments = random_packed(size), weights(size, seed=1)
        assert torch.equal(run(ours, *arguments), both(theirs, *arguments))
        assert torch.equal(ours, theirs)

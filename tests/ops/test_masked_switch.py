"""masked_switch_ beyond its contract: no drift, untouched bits, overlap, errors, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled import compiled
from contract import assert_same_bits
from samples import random_packed, weights

import taskloom

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.01, 0.5])
def test_there_and_back_restores_every_bit(dtype: torch.dtype, density: float) -> None:
    numel = 5001
    base, delta = weights(numel, dtype=dtype), weights(numel, seed=1, scale=0.01)
    first, second = (random_packed(numel, seed=seed, density=density) for seed in range(2))
    target = taskloom.masked_update(base, first, delta)
    start = target.clone()
    for _ in range(3):
        taskloom.masked_switch_(target, base, delta, first, second)
        assert_same_bits(target, taskloom.masked_update(base, second, delta))
        taskloom.masked_switch_(target, base, delta, second, first)
        assert_same_bits(target, start)


@pytest.mark.parametrize("density", [0.0, 0.01, 0.5])
def test_only_changed_entries_are_written(density: float) -> None:
    numel = 5001
    old, flips = random_packed(numel), random_packed(numel, seed=1, density=density)
    target = torch.full((numel,), float("nan"))
    taskloom.masked_switch_(target, torch.zeros(numel), torch.ones(numel), old, old ^ flips)
    assert torch.equal(~target.isnan(), taskloom.unpack_mask(flips, (numel,)))


@pytest.mark.parametrize(("integer", "dtype"), [(torch.int16, torch.bfloat16), (torch.int32, torch.float32)])
def test_base_bits_are_copied(integer: torch.dtype, dtype: torch.dtype) -> None:
    bounds = torch.iinfo(integer)
    raw = torch.randint(bounds.min, bounds.max, (4000,), generator=torch.Generator().manual_seed(0), dtype=integer)
    none = torch.zeros(500, dtype=torch.uint8)
    for density in (0.02, 0.5):
        packed = random_packed(4000, density=density)
        base = raw.view(dtype)
        target = torch.zeros_like(base)
        taskloom.masked_switch_(target, base, torch.ones(4000), packed, none)
        chosen = taskloom.unpack_mask(packed, (4000,))
        assert_same_bits(target[chosen], base[chosen])


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("argument", ["base", "delta", "old_packed"])
def test_shared_memory_is_refused(backend: str, argument: str) -> None:
    target = weights(64)
    shared = target.view(torch.uint8)[:8] if argument == "old_packed" else target
    arguments = {"base": weights(64), "delta": weights(64), "old_packed": random_packed(64), "new_packed": random_packed(64, seed=1)}
    with taskloom.backend(backend), pytest.raises(ValueError, match=f"masked_switch_: target: must not share memory with {argument}"):
        taskloom.masked_switch_(target, **(arguments | {argument: shared}))
    assert torch.equal(target, weights(64))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": torch.zeros(9, dtype=torch.int32)}, TypeError, "target: expected float32"),
        ({"base": torch.zeros(8)}, ValueError, r"base: expected shape \(9,\) as target"),
        ({"delta": torch.zeros(9, 1)}, ValueError, r"delta: expected shape \(9,\) as target"),
        ({"old_packed": torch.zeros(1, dtype=torch.uint8)}, ValueError, r"old_packed: expected shape \(2,\)"),
        ({"new_packed": torch.zeros(2, dtype=torch.bool)}, TypeError, "new_packed: expected torch.uint8"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {
        "target": weights(9),
        "base": weights(9),
        "delta": weights(9),
        "old_packed": random_packed(9),
        "new_packed": random_packed(9),
    }
    with pytest.raises(error, match=f"masked_switch_: {message}"):
        taskloom.masked_switch_(**(arguments | changes))


def test_refuses_what_requires_grad_and_transforms() -> None:
    leaf = torch.zeros(8, requires_grad=True)
    plain, many = weights(8), weights(2, 8)
    masks = random_packed(8), random_packed(8, seed=1)
    with pytest.raises(RuntimeError, match=r"masked_switch_: target requires grad and the op is in place; use torch.no_grad"):
        taskloom.masked_switch_(leaf, plain, plain, *masks)
    with pytest.raises(RuntimeError, match=r"masked_switch_ does not work under torch.func's vmap transform"):
        torch.func.vmap(lambda one: taskloom.masked_switch_(one, plain, plain, *masks))(many)


def test_compiled() -> None:
    run = compiled(taskloom.masked_switch_)
    for size in (20, 44):
        ours, theirs = weights(size), weights(size)
        arguments = weights(size, seed=1), weights(size, seed=2), random_packed(size), random_packed(size, seed=1)
        run(ours, *arguments)
        taskloom.masked_switch_(theirs, *arguments)
        assert torch.equal(ours, theirs)

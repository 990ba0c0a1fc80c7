"""Fused optimiser steps over many parameters of all kinds, and what the device refuses."""

from __future__ import annotations

from typing import Any

import emulated
import pytest
import torch
from contract import copied
from samples import awkward, normal, random_packed, set_tail

import taskloom

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPTIONS = {
    "masked_adamw_": [(0.01, 0.8, 0.95, 1e-6, 0.1, False), (1e-3, 0.9, 0.999, 1e-8, 0.0, True)],
    "masked_sgd_": [
        (0.1, 0.0, 0.0, 0.0, False, False),
        (0.1, 0.9, 0.2, 0.1, False, True),
        (0.1, 0.9, 0.0, 0.0, True, False),
    ],
}


def _shifted(values: torch.Tensor, entries: int) -> torch.Tensor:
    room = torch.empty(values.numel() + entries, dtype=values.dtype)
    return room[entries:].copy_(values)


def _active(numel: int, place: int) -> torch.Tensor:
    packed = set_tail(random_packed(numel, seed=place, density=(0.02, 0.5, 1.0, 0.0)[place % 4]), numel)
    indices = taskloom.unpack_mask(packed, (numel,)).nonzero().squeeze(1)
    return (packed, _shifted(packed, 1), indices.int(), indices, torch.empty(0, dtype=torch.bool))[place % 5]


def _count(active: torch.Tensor, numel: int) -> int:
    if active.dtype == torch.uint8:
        return int(taskloom.unpack_mask(active, (numel,)).sum())
    return numel if active.dtype == torch.bool else active.numel()


def _arguments(op: str, sizes: list[int], options: tuple[Any, ...]) -> tuple[Any, ...]:
    params, grads, active, states = [], [], [], [[], []]
    for place, numel in enumerate(sizes):
        dtype = DTYPES[place % 4]
        params.append(_shifted(torch.cat([awkward(dtype), normal(numel, seed=place, dtype=dtype)])[:numel], place % 3))
        grads.append(_shifted(normal(numel, seed=100 + place, dtype=dtype), place % 2))
        active.append(_active(numel, place))
        for number, state in enumerate(states):
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            state.append(normal(_count(active[-1], numel), seed=200 + place, dtype=wide).abs() + number)
    steps = [1.0 + place % 3 for place in range(len(sizes))]
    if op == "masked_sgd_":
        return params, grads, states[0] if options[1] else [], active, steps, *options
    return params, grads, *states, active, steps, *options


def _assert_equal(got: torch.Tensor, expected: torch.Tensor, before: torch.Tensor) -> None:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    same = got.view(integers) == expected.view(integers)
    # NaN may come with another payload, where an entry was stepped.
    assert (same | (got.isnan() & expected.isnan())).all()
    kept = expected.view(integers) == before.view(integers)
    assert same[kept & ~expected.isnan()].all()


@pytest.mark.parametrize(("op", "options"), [(op, options) for op, all_options in OPTIONS.items() for options in all_options])
def test_many_parameters(op: str, options: tuple[Any, ...], order: str) -> None:
    emulated.library()
    arguments = _arguments(op, [0, 1, 7, *range(20, 1500, 41), 3000, 70_003, 5], options)
    ours, theirs = copied(arguments), copied(arguments)
    getattr(torch.ops.taskloom_emulated, op).default(*ours)
    getattr(torch.ops.taskloom, op).default(*theirs)
    for got, expected, before in zip(ours[0], theirs[0], arguments[0], strict=True):
        _assert_equal(got, expected, before)
    for listed in range(2, 4 if op == "masked_adamw_" else 3):
        for got, expected, before in zip(ours[listed], theirs[listed], arguments[listed], strict=True):
            _assert_equal(got, expected, before)


def test_inactive_entries_keep_their_bits() -> None:
    emulated.library()
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        param, packed = bits.view(dtype).clone(), random_packed(1 << 16, density=0.3)
        active = taskloom.unpack_mask(packed, (1 << 16,))
        state = [torch.zeros(int(active.sum())) for _ in range(2)]
        options = OPTIONS["masked_adamw_"][0]
        arguments = ([param], [torch.ones_like(param)], [state[0]], [state[1]], [packed], [1.0], *options)
        torch.ops.taskloom_emulated.masked_adamw_(*arguments)
        assert param.view(torch.int16)[~active].equal(bits[~active])
        assert (param.view(torch.int16)[active] != bits[active]).any()


def _adamw(param: torch.Tensor, active: torch.Tensor, sizes: tuple[int, int]) -> None:
    emulated.library()
    states = [[torch.zeros(size)] for size in sizes]
    options = OPTIONS["masked_adamw_"][0]
    torch.ops.taskloom_emulated.masked_adamw_([param], [torch.ones_like(param)], *states, [active], [1.0], *options)


@pytest.mark.parametrize(
    ("active", "sizes", "message"),
    [
        (taskloom.pack_mask(torch.tensor([True, False, True])), (3, 2), "exp_avg: expected one element for each active entry"),
        (taskloom.pack_mask(torch.tensor([True, False, True])), (2, 1), "exp_avg_sq: expected one element for each active entry"),
        (torch.tensor([0, 2]), (2, 3), r"exp_avg_sq\[0\]: expected 2 elements, one for each active entry, got 3"),
        (torch.empty(0, dtype=torch.bool), (2, 3), r"exp_avg\[0\]: expected 3 elements, one for each active entry, got 2"),
        *[
            (torch.tensor(indices, dtype=dtype), (len(indices),) * 2, "active: expected ascending indices without repeats")
            for indices in ([2, 0], [1, 1], [0, 3], [-1, 0])
            for dtype in (torch.int32, torch.int64)
        ],
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(active: torch.Tensor, sizes: tuple[int, int], message: str) -> None:
    param = torch.arange(3.0)
    with pytest.raises(RuntimeError, match=message):
        _adamw(param, active, sizes)
    assert param.equal(torch.arange(3.0))


def test_indices_out_of_order_between_tiles_are_refused() -> None:
    indices = torch.arange(5000)
    indices[3072] = indices[3071]
    with pytest.raises(RuntimeError, match="active: expected ascending indices"):
        _adamw(torch.zeros(5000), indices, (5000, 5000))


def test_shared_memory_is_refused() -> None:
    emulated.library()
    param = torch.zeros(8)
    everything = torch.empty(0, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="must not share memory"):
        torch.ops.taskloom_emulated.masked_sgd_([param], [param], [], [everything], [1.0], *OPTIONS["masked_sgd_"][0])

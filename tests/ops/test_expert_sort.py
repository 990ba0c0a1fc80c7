"""expert_sort beyond its contract: what its parts mean, bad ids, sizes, compilation."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from cases_expert import chosen
from compiled import compiled

import taskloom


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("block", [1, 5, 64])
def test_parts(dtype: torch.dtype, block: int) -> None:
    tokens, experts, k = 83, 11, 3
    ids = chosen(tokens, experts, k, dtype=dtype)
    found = taskloom.expert_sort(ids, experts, block=block)
    assert found.padded_order is not None
    assert found.padded_offsets is not None
    assert found.block_expert is not None
    assert all(one.dtype == torch.int32 for one in found if one is not None)
    flat = ids.reshape(-1).numpy()
    np.testing.assert_array_equal(found.order, np.argsort(flat, kind="stable"))
    np.testing.assert_array_equal(found.inverse.reshape(-1), np.argsort(found.order.numpy(), kind="stable"))
    np.testing.assert_array_equal(found.offsets, np.concatenate([[0], np.cumsum(np.bincount(flat, minlength=experts))]))
    padded, starts = found.padded_order.numpy(), found.padded_offsets.numpy()
    assert len(padded) % block == 0
    assert len(found.block_expert) == len(padded) // block
    for expert in range(experts):
        run = found.order[found.offsets[expert] : found.offsets[expert + 1]].numpy()
        own = padded[starts[expert] : starts[expert + 1]]
        np.testing.assert_array_equal(own[: len(run)], run)
        assert (own[len(run) :] == tokens * k).all()
        assert len(own) == -(-len(run) // block) * block
        assert (found.block_expert[starts[expert] // block : starts[expert + 1] // block] == expert).all()
    assert (padded[starts[-1] :] == tokens * k).all()
    assert (found.block_expert[starts[-1] // block :] == -1).all()


def test_the_bound_of_blocks_is_reached() -> None:
    ids = torch.tensor([[0], [1], [2], [2], [2], [2], [2]])
    found = taskloom.expert_sort(ids, 3, block=4)
    assert found.padded_offsets is not None
    assert found.padded_order is not None
    assert int(found.padded_offsets[-1]) == len(found.padded_order) == 16
    few = taskloom.expert_sort(torch.tensor([[5], [7]]), 64, block=4)
    assert few.padded_order is not None
    assert len(few.padded_order) == 8


def test_without_blocks_there_are_none() -> None:
    assert taskloom.expert_sort(chosen(4, 5, 2), 5)[3:] == (None, None, None)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("wrong", [-1, 12, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_out_of_range(backend: str, wrong: int, dtype: torch.dtype) -> None:
    ids = chosen(9000, 12, 2, dtype=dtype)
    ids[8000, 1] = ids[8999, 0] = wrong
    with taskloom.backend(backend), pytest.raises(ValueError, match=f"ids: expected 0 to 11, .*, got {wrong} at entry 16001"):
        taskloom.expert_sort(ids, 12)


def test_wide_ids_are_not_cut_off() -> None:
    with pytest.raises(ValueError, match=f"got {2**32} at entry 1"):
        taskloom.expert_sort(torch.tensor([[0, 2**32]]), 3)


def test_ids_that_change_meanwhile_do_no_harm() -> None:
    ids, calm = chosen(20000, 60, 4), chosen(20000, 60, 4, seed=1)
    running = [True]

    def change() -> None:
        while running[0]:
            ids.copy_(calm)
            ids.fill_(1)

    thread = threading.Thread(target=change)
    thread.start()
    for _ in range(30):
        taskloom.expert_sort(ids, 60, block=16)
    running[0] = False
    thread.join()


def test_compiled(fresh_compiler: None) -> None:
    def sort(ids: torch.Tensor) -> Any:
        found = taskloom.expert_sort(ids, 9, block=8)
        return found.order, found.padded_order, found.block_expert

    run = compiled(sort)
    for tokens in (7, 30):
        ids = chosen(tokens, 9, 2)
        for ours, theirs in zip(run(ids), sort(ids), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3, 2), 4), TypeError, "ids: expected a tensor of int32 or int64, got torch.float32"),
        ((torch.zeros(3, 2).short(), 4), TypeError, "ids: expected a tensor of int32 or int64, got torch.int16"),
        ((torch.tensor(1), 4), ValueError, "ids: expected at least one dimension"),
        ((torch.zeros(3, 2).int(), 0), ValueError, "num_experts: expected at least 1, got 0"),
        ((torch.zeros(3, 2).int(), 2.5), TypeError, "num_experts: expected an integer, got float"),
        ((torch.zeros(3, 2).int(), 2**31), ValueError, r"num_experts: expected fewer than 2\^31 - 1, got 2147483648"),
        ((torch.zeros(3, 2).int(), True), TypeError, "num_experts: expected an integer, got bool"),
    ],
)
def test_errors(backend: str, arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with taskloom.backend(backend), pytest.raises(error, match=f"expert_sort: {message}"):
        taskloom.expert_sort(*arguments)


def test_errors_of_blocks() -> None:
    ids = torch.zeros(3, 2).int()
    with pytest.raises(ValueError, match="block: expected at least 1, got 0"):
        taskloom.expert_sort(ids, 4, block=0)
    with pytest.raises(ValueError, match=r"fewer than 2\^31 entries, with what fills blocks up"):
        taskloom.expert_sort(ids, 4, block=2**30)
    with pytest.raises(ValueError, match=r"fewer than 2\^31 entries"):
        taskloom.expert_sort(torch.zeros(1).int().expand(2**31 + 1), 4)


def test_reference_under_vmap_and_compiled(fresh_compiler: None) -> None:
    batches = torch.stack([chosen(13, 5, 2, seed=seed) for seed in range(3)])
    for block in (None, 4):
        found = torch.func.vmap(
            lambda ids, block=block: tuple(one for one in taskloom.expert_sort(ids, 5, block=block) if one is not None)
        )(batches)
        for row, ids in enumerate(batches):
            expected = [one for one in taskloom.expert_sort(ids, 5, block=block) if one is not None]
            assert all(torch.equal(ours[row], theirs) for ours, theirs in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="expert_sort: ids: expected 0 to 3, the number of an expert, got 4"):
        torch.func.vmap(lambda ids: taskloom.expert_sort(ids, 4).order)(batches)
    with taskloom.backend("reference"):
        run = compiled(lambda ids: taskloom.expert_sort(ids, 5, block=4).padded_order)
        assert torch.equal(run(batches[0]), taskloom.expert_sort(batches[0], 5, block=4).padded_order)

"""forget_rows_, chunk_update_ and prune_and_rewind_."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from taskloom.optim import chunk_update_, forget_rows_, prune_and_rewind_


def _seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_forgotten_rows_are_fresh_and_others_keep_their_bits() -> None:
    weight, moment = _seeded(40, 513), _seeded(40, 513, seed=1)
    rows = torch.arange(40) % 3 == 0
    before, old = weight.clone(), moment.clone()
    assert forget_rows_(weight, rows, std=0.02, seed=5, states=[moment]) is weight
    assert torch.equal(weight[~rows], before[~rows])
    assert torch.equal(moment[~rows], old[~rows])
    assert not moment[rows].any()
    fresh = weight[rows]
    assert abs(float(fresh.std()) - 0.02) < 5e-4
    assert abs(float(fresh.mean())) < 1e-3
    assert abs(float((fresh / 0.02).pow(4).mean()) - 3) < 0.3


def test_a_row_depends_on_seed_and_key_alone() -> None:
    together, alone = torch.zeros(9, 7), torch.zeros(9, 7)
    forget_rows_(together, torch.arange(9), std=1, seed=3, key=2)
    forget_rows_(alone, torch.tensor([6], dtype=torch.int32), std=1, seed=3, key=2)
    assert torch.equal(alone[6], together[6])
    assert not torch.equal(together, forget_rows_(torch.zeros(9, 7), torch.arange(9), std=1, seed=4, key=2))
    assert not torch.equal(together, forget_rows_(torch.zeros(9, 7), torch.arange(9), std=1, seed=3, key=3))
    assert together.flatten().unique().numel() == 63


def test_wrong_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="rows: expected rows from 0 to below 3, got 1 to 3"):
        forget_rows_(torch.zeros(3, 2), torch.tensor([1, 3]), std=1, seed=0)
    with pytest.raises(ValueError, match=r"rows: expected shape \(3,\)"):
        forget_rows_(torch.zeros(3, 2), torch.ones(4, dtype=torch.bool), std=1, seed=0)
    with pytest.raises(RuntimeError, match="requires grad"):
        forget_rows_(torch.zeros(3, 2, requires_grad=True), torch.tensor([1]), std=1, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", ["set", "add"])
def test_chunks_are_written_and_undone(mode: str, dtype: torch.dtype) -> None:
    base, chunks, ids = _seeded(23).to(dtype), _seeded(3, 5, seed=1), torch.tensor([4, 0, 2], dtype=torch.int32)
    before, undo = base.clone(), torch.full((3, 5), torch.nan, dtype=dtype)
    expected = torch.nn.functional.pad(base, (0, 2)).view(5, 5).double()
    for place, number in enumerate(ids.tolist()):
        expected[number] = 0.5 * chunks[place].double() + (expected[number] if mode == "add" else 0)
    chunk_update_(base, ids, chunks, mode, alpha=0.5, undo=undo)
    torch.testing.assert_close(base, expected.flatten()[:23].to(dtype))
    assert not undo[0, 3:].any()
    chunk_update_(base, ids, undo)
    assert torch.equal(base, before)


def test_wrong_chunks_are_refused() -> None:
    base = torch.zeros(10)
    for ids, message in (([0, 0], "no id twice"), ([0, 3], "ids from 0 to below 3, got 0 to 3")):
        with pytest.raises(ValueError, match=message):
            chunk_update_(base, torch.tensor(ids), torch.ones(2, 4))
    assert not base.any()


def test_pruning_is_global_exact_and_rewinds() -> None:
    params = [(3 * _seeded(7, 9)).round(), (3 * _seeded(31, seed=1)).round()]
    masks = [_seeded(7, 9, seed=2) > -1, _seeded(31, seed=3) > -1]
    initial = [_seeded(7, 9, seed=4), _seeded(31, seed=5)]
    flat, alive = torch.cat([one.flatten() for one in params]), torch.cat([one.flatten() for one in masks])
    places = alive.nonzero().squeeze(1)
    keep = places.numel() - int(0.4 * places.numel())
    expected = torch.zeros(flat.numel(), dtype=torch.bool)
    expected[places[flat[places].abs().sort(descending=True, stable=True).indices[:keep]]] = True
    new = prune_and_rewind_(params, masks, initial, 0.4)
    assert torch.equal(torch.cat([one.flatten() for one in new]), expected)
    for param, mask, value in zip(params, new, initial, strict=True):
        assert torch.equal(param, torch.where(mask, value, 0.0))
    with pytest.raises(ValueError, match=r"fraction: expected 0 to 1, got 1.5"):
        prune_and_rewind_(params, masks, initial, 1.5)

"""Memory mixing: few synthetic task vectors of the blocks with the largest gradients."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from atlas_samples import encoder, error, rows, tuned, vectors
from torch import Tensor, nn

from taskloom.merge.task_vector import TaskVector
from taskloom.methods.merging.atlas import AtlasModel, block_gradients, mix_blocks, select_blocks


def _loss(model: nn.Module) -> Tensor:
    loss: Tensor = model(rows()).square().sum()
    return loss


def test_block_gradients_are_the_coefficients_gradients_at_zero() -> None:
    """[4]."""
    model = encoder()
    pool = vectors(model, 4, torch.float16)
    model[3].weight.requires_grad_(False)
    got = block_gradients(model, pool, _loss)
    assert [one.requires_grad for one in model.parameters()] == [True, True, True, True, False, True]
    assert all(one.grad is None for one in model.parameters())
    adapter = AtlasModel(model, pool)
    _loss(adapter).backward()
    assert adapter.coef.grad is not None
    assert got.shape == (4, 6)
    assert error(got, adapter.coef.grad) <= 1e-6
    assert torch.equal(block_gradients(model, pool, _loss, target_modules=["3"]), got[:, 4:])


def test_running_statistics_are_left_as_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4)).train()
    before = copy.deepcopy(model.state_dict())
    block_gradients(model, vectors(model), _loss)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_a_block_without_a_part_in_the_loss_has_gradient_zero() -> None:
    model = encoder()
    got = block_gradients(model, vectors(model), lambda model: model.get_submodule("0")(rows()).sum())
    assert got[:, :2].all()
    assert not got[:, 2:].any()


def test_selection_takes_the_largest_of_each_block() -> None:
    grads = torch.tensor([[1.0, -5.0, 0.0], [-3.0, 2.0, 0.0], [2.0, 4.0, 0.0]])
    assert select_blocks(grads, 2).tolist() == [[1, 0, 0], [2, 2, 1]]
    assert select_blocks(grads, 1, by="vector").tolist() == [[0, 0, 0]]
    drawn = select_blocks(grads, 3, by="random", seed=4)
    assert torch.equal(drawn, select_blocks(grads, 3, by="random", seed=4))
    assert sorted(drawn[:, 0].tolist()) == [0, 1, 2]
    assert (drawn == drawn[:, :1]).all()


def test_mixed_vectors_are_made_of_the_pools_blocks() -> None:
    model = encoder()
    pool = [TaskVector(model, tuned(model, seed)) for seed in range(1, 5)]
    grads = block_gradients(model, pool, _loss)
    mixed = mix_blocks(pool, grads, 2)
    chosen = select_blocks(grads, 2).tolist()
    assert len(mixed) == 2
    for s, vector in enumerate(mixed):
        assert isinstance(vector, TaskVector)
        for b, name in enumerate(grads.block_names):
            assert torch.equal(vector[name], pool[chosen[s][b]][name])
    # The whole pool again, in each block in another order: the same models can be composed.
    every = AtlasModel(model, mix_blocks(pool, grads, 4))
    _loss(every).backward()
    assert every.coef.grad is not None
    assert error(every.coef.grad.abs().sort(0).values, grads.abs().sort(0).values) <= 1e-5


def test_the_order_of_a_vectors_names_does_not_matter(tmp_path: Path) -> None:
    model = encoder()
    pool = [TaskVector(model, tuned(model, seed)) for seed in range(1, 5)]
    for place, vector in enumerate(pool):
        vector.save(tmp_path / f"{place}.safetensors")
    stored = [TaskVector.load(tmp_path / f"{place}.safetensors") for place in range(4)]
    shuffled = [{name: vector[name] for name in sorted(vector)} for vector in pool]
    grads = block_gradients(model, pool, _loss)
    for others in (stored, shuffled):
        assert torch.equal(block_gradients(model, others, _loss), grads)
        for got, expected in zip(mix_blocks(others, grads, 2), mix_blocks(pool, grads, 2), strict=True):
            assert set(got) == set(expected)
            assert all(torch.equal(got[name], expected[name]) for name in expected)
    for same in (copy.deepcopy(grads), pickle.loads(pickle.dumps(grads))):
        assert same.block_names == grads.block_names == tuple(name for name, _ in model.named_parameters())
        assert torch.equal(same, grads)
    plain = mix_blocks(pool, grads.clone(), 2, names=grads.block_names)
    assert all(torch.equal(plain[0][name], mix_blocks(pool, grads, 2)[0][name]) for name in plain[0])


def test_the_regime_is_kept() -> None:
    model = encoder()
    pool = [TaskVector(model, tuned(model, seed), regime="linear") for seed in (1, 2)]
    grads = block_gradients(model, pool, _loss)
    assert [one.regime for one in mix_blocks(pool, grads, 2)] == ["linear", "linear"]
    with pytest.raises(ValueError, match="expected one regime"):
        mix_blocks([pool[0], pool[1].as_regime("nonlinear")], grads, 1)


def test_bad_input() -> None:
    model = encoder()
    pool, grads, names = vectors(model), torch.ones(3, 6), [name for name, _ in model.named_parameters()]
    cases: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
        (grads, 0, {}, ValueError, "budget: expected 1 to 3, the number of task vectors, got 0"),
        (grads, 4, {}, ValueError, "budget: expected 1 to 3, the number of task vectors, got 4"),
        (grads, 1.0, {}, TypeError, "budget: expected an integer, got float"),
        (grads / 0, 1, {}, ValueError, "block_grads: expected finite values"),
        (grads[0], 1, {}, ValueError, r"block_grads: expected shape \[n, m\], got \(6,\)"),
        (grads[:, :5], 1, {"names": names}, ValueError, r"expected shape \[3, 6\], a row for each task vector"),
        (grads, 1, {}, ValueError, "names: expected the blocks' names, which a plain tensor of gradients does not tell"),
        (block_gradients(model, pool, _loss), 1, {"names": names[::-1]}, ValueError, r"expected those of block_grads, '0\.weight'"),
        (grads, 1, {"by": "norm"}, ValueError, "by: expected 'block', 'vector' or 'random', got 'norm'"),
        (grads[:, :1], 1, {"names": ["9.weight"]}, ValueError, r"task-0: lacks '9\.weight'"),
    ]
    for block_grads, budget, settings, kind, message in cases:
        with pytest.raises(kind, match=message):
            mix_blocks(pool, block_grads, budget, **settings)
    with pytest.raises(ValueError, match=r"loss_fn: expected a scalar that depends on the model's blocks, got shape \(6, 5\)"):
        block_gradients(model, pool, lambda model: model(rows()))
    with pytest.raises(ValueError, match=r"requires_grad=False"):
        block_gradients(model, pool, lambda model: torch.tensor(1.0))

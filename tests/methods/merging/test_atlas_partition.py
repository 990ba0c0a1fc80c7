"""aTLAS x K: the groups of a block's entries; numbers in brackets are the card's invariants."""

from __future__ import annotations

import math

import pytest
import torch
from atlas_samples import encoder, error, rows, spread, vectors

from taskloom._selection import name_key
from taskloom.methods.merging.atlas import AtlasModel, draw_groups, partition
from taskloom.reference.masked.philox import philox_words


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
@pytest.mark.parametrize("groups", [2, 3, 256])
@pytest.mark.parametrize("shape", [(7, 13), (), (0,), (2, 3, 5)])
def test_groups_are_the_references_words(shape: tuple[int, ...], groups: int, seed: int) -> None:
    words = philox_words(seed, name_key("layer.weight"), math.prod(shape), torch.device("cpu"))
    drawn = draw_groups("layer.weight", shape, groups, seed)
    assert drawn.dtype == torch.uint8
    assert torch.equal(drawn, (words * groups >> 32).to(torch.uint8).view(shape))


def test_the_size_of_the_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    expected = draw_groups("a", (1009,), 10, 3)
    monkeypatch.setitem(partition._PIECE, "cpu", 17)
    assert torch.equal(draw_groups("a", (1009,), 10, 3), expected)


def test_every_group_has_its_share() -> None:
    """[7]."""
    numel, groups = 300_000, 10
    counts = torch.bincount(draw_groups("a", (numel,), groups).long(), minlength=groups)
    sigma = math.sqrt(numel / groups * (1 - 1 / groups))
    assert (counts - numel / groups).abs().max() <= 5 * sigma


def test_a_seed_gives_the_same_partition_again_and_another_one_another() -> None:
    """[7]."""
    model = encoder()
    first, again, other = (AtlasModel(model, vectors(model), partitions=5, partition_seed=seed).partition for seed in (1, 1, 2))
    assert first is not None
    assert again is not None
    assert other is not None
    assert list(first) == ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]
    for name, groups in first.items():
        assert groups.shape == model.get_parameter(name).shape
        assert torch.equal(again[name], groups)
    assert not torch.equal(other["0.weight"], first["0.weight"])
    # Blocks of one shape draw apart.
    assert not torch.equal(first["1.weight"], first["1.bias"])


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_a_gpu_draws_the_same(seed: int) -> None:
    """[7]."""
    drawn = draw_groups("layer.weight", (1_000_003,), 10, seed, "cuda")
    assert drawn.device.type == "cuda"
    assert torch.equal(drawn.cpu(), draw_groups("layer.weight", (1_000_003,), 10, seed))


def test_one_group_is_the_model_without_a_partition() -> None:
    """[5]."""
    model, x = encoder(), rows()
    plain = AtlasModel(model, vectors(model))
    assert plain.partition is None
    spread(plain.coef)
    for groups, tolerance in ((1, 0.0), (6, 1e-6)):
        adapter = AtlasModel(model, vectors(model), partitions=groups)
        with torch.no_grad():
            adapter.coef.copy_(plain.coef if groups == 1 else plain.coef[..., None].expand_as(adapter.coef))
        assert error(adapter(x), plain(x)) <= tolerance


def test_the_gradients_of_groups_sum_to_the_blocks() -> None:
    """[6]."""
    model, x = encoder(), rows()
    plain, grouped = AtlasModel(model, vectors(model)), AtlasModel(model, vectors(model), partitions=6)
    spread(plain.coef)
    with torch.no_grad():
        grouped.coef.copy_(plain.coef[..., None].expand_as(grouped.coef))
    for adapter in (plain, grouped):
        adapter(x).square().sum().backward()
    assert plain.coef.grad is not None
    assert grouped.coef.grad is not None
    assert error(grouped.coef.grad.sum(2), plain.coef.grad) <= 1e-5


def test_groups_scale_their_own_entries() -> None:
    model, task_vectors = encoder(), vectors(encoder(), 2)
    adapter = AtlasModel(model, task_vectors, partitions=3)
    spread(adapter.coef)
    groups = adapter.partition
    assert groups is not None
    state = adapter.materialize()
    for b, name in enumerate(adapter.block_names):
        expected = model.get_parameter(name).detach().double()
        for t, vector in enumerate(task_vectors):
            expected += adapter.coef.detach()[t, b][groups[name].long()].double() * vector[name].double()
        assert error(state[name], expected) <= 1e-6

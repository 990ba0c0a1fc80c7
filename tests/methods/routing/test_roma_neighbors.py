"""RoMA's reference set, neighbours and manifold loss, against loops over samples."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from taskloom.methods.routing.roma import Neighbors, ReferenceSet, RoMAConfig, manifold_loss, neighbor_weights, random_neighbors
from taskloom.methods.routing.roma import neighbors as neighbors_module

CONFIG = RoMAConfig(layers=-2)


def _drawn(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _unit(rows: int, columns: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(_drawn(rows, columns, seed), dim=1)


def _reference(count: int = 23, columns: int = 6, experts: tuple[int, ...] = (4, 4), seed: int = 0) -> ReferenceSet:
    r = torch.cat([_drawn(count, size, seed + 1 + place).softmax(1) for place, size in enumerate(experts)], 1)
    return ReferenceSet(_unit(count, columns, seed), r, torch.arange(0, 2 * count, 2), experts)


def _by_hand(emb: Tensor, keys: Tensor | None, ref: ReferenceSet, config: RoMAConfig) -> list[dict[int, float]]:
    """Each sample's neighbours and their shares, in plain NumPy."""
    found = []
    for place, one in enumerate(emb.double().numpy()):
        distances = np.square(ref.emb.double().numpy() - one).sum(1)
        similar = np.exp(-distances / (2 * config.sigma**2))
        usable = [j for j in range(len(similar)) if keys is None or ref.keys[j] != keys[place]]
        ranked = sorted(usable, key=lambda j: (-similar[j], j))
        chosen = ranked[: config.k] if config.eps is None else [j for j in ranked if similar[j] >= config.eps]
        found.append({j: similar[j] / sum(similar[i] for i in chosen) for j in chosen})
    return found


def _as_dicts(found: Neighbors) -> list[dict[int, float]]:
    return [
        {int(j): float(share) for j, share in zip(ids, weight, strict=True) if share > 0}
        for ids, weight in zip(found.ids, found.weight, strict=True)
    ]


@pytest.mark.parametrize("options", [{}, {"k": 1}, {"k": 5, "sigma": 0.2}, {"eps": 0.3}, {"eps": 0.3, "sigma": 2.0}, {"eps": 0.0}])
@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("part", [neighbors_module._PART, 1])
def test_neighbours_are_the_most_similar(options: dict[str, Any], exclude: bool, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors_module, "_PART", part)
    config, ref = replace(CONFIG, exclude_self=exclude, **options), _reference()
    emb = torch.cat([ref.emb[:9], _unit(8, 6, 7)])
    keys = torch.cat([ref.keys[:9], torch.arange(1, 17, 2)]) if exclude else None
    found = neighbor_weights(emb, ref, config, keys)
    expected = _by_hand(emb, keys, ref, config)
    assert found.weight.dtype == torch.float32
    for ours, theirs in zip(_as_dicts(found), expected, strict=True):
        assert list(ours) == list(theirs)
        assert list(ours.values()) == pytest.approx(list(theirs.values()), abs=1e-6)
    sums = found.weight.sum(1)
    torch.testing.assert_close(sums, torch.tensor([float(bool(one)) for one in expected]), rtol=1e-6, atol=1e-6)


def test_a_sample_is_no_neighbour_of_itself() -> None:
    ref = _reference()
    without = neighbor_weights(ref.emb, ref, CONFIG, ref.keys)
    places = torch.arange(len(ref.emb))
    assert not (without.ids == places[:, None]).any()
    within = neighbor_weights(ref.emb, ref, replace(CONFIG, exclude_self=False))
    assert torch.equal(within.ids[:, 0], places)


def test_equal_distances_go_by_number() -> None:
    ref = _reference(count=9)
    ref = replace(ref, emb=ref.emb[:1].expand(9, -1).contiguous())
    found = neighbor_weights(ref.emb, ref, CONFIG, ref.keys)
    assert found.ids[0].tolist() == [1, 2, 3]
    assert found.ids[5].tolist() == [0, 1, 2]
    assert torch.equal(found.weight, torch.full((9, 3), 1 / 3))


def test_fewer_samples_than_neighbours() -> None:
    ref = _reference(count=2)
    found = neighbor_weights(ref.emb, ref, CONFIG, ref.keys)
    assert found.ids.tolist() == [[1], [0]]
    alone = _reference(count=1)
    assert neighbor_weights(alone.emb, alone, CONFIG, alone.keys).ids.shape == (1, 0)
    assert neighbor_weights(torch.empty(0, 6), ref, CONFIG, torch.empty(0, dtype=torch.int64)).ids.shape == (0, 0)


def test_far_embeddings_keep_their_shares() -> None:
    """Similarities that are 0 even in float64, and yet one is e times the other."""
    ref = replace(_reference(count=3), emb=torch.tensor([[60.0, 0.0], [60.0, 0.5**0.5], [80.0, 0.0]]))
    found = neighbor_weights(torch.zeros(1, 2), ref, replace(CONFIG, exclude_self=False, k=2))
    assert found.ids.tolist() == [[0, 1]]
    torch.testing.assert_close(found.weight[0], torch.tensor([1.0, 0.0]).softmax(0), rtol=1e-5, atol=0.0)


def test_random_neighbours() -> None:
    ref = _reference()
    found = random_neighbors(40, ref, CONFIG, torch.arange(40), torch.Generator().manual_seed(0))
    assert all(len(set(row.tolist())) == 3 for row in found.ids)
    assert not (ref.keys[found.ids] == torch.arange(40)[:, None]).any()
    assert len(found.ids.unique()) > 20
    again = random_neighbors(40, ref, CONFIG, torch.arange(40), torch.Generator().manual_seed(0))
    assert torch.equal(found.ids, again.ids)
    with pytest.raises(ValueError, match="random_neighbors: k: expected at most 22, got 30"):
        random_neighbors(4, ref, replace(CONFIG, k=30), torch.arange(4))


def test_the_loss_is_the_weighted_squared_distance() -> None:
    ref = _reference()
    found = neighbor_weights(ref.emb, ref, CONFIG, ref.keys)
    r = _reference(seed=9).r.requires_grad_()
    loss = manifold_loss(r, ref.r, found.ids, found.weight)
    expected = (found.weight * (r[:, None] - ref.r[found.ids]).square().sum(2)).sum(1)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    (ours,) = torch.autograd.grad(loss.sum(), r)
    (theirs,) = torch.autograd.grad(expected.sum(), r)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_loss_is_a_distance_to_the_mean_and_a_constant() -> None:
    ref = _reference()
    found = neighbor_weights(ref.emb, ref, CONFIG, ref.keys)
    r = _reference(seed=9).r
    mean = (found.weight.unsqueeze(2) * ref.r[found.ids]).sum(1)
    spread = (found.weight * (ref.r[found.ids] - mean[:, None]).square().sum(2)).sum(1)
    loss = manifold_loss(r, ref.r, found.ids, found.weight)
    torch.testing.assert_close(loss, (r - mean).square().sum(1) + spread, rtol=1e-5, atol=1e-6)


def test_the_loss_is_zero_where_all_are_routed_alike() -> None:
    ref = _reference()
    alike = ref.r[:1].expand(len(ref.r), -1).contiguous()
    found = neighbor_weights(ref.emb, ref, CONFIG, ref.keys)
    assert (manifold_loss(alike, alike, found.ids, found.weight) == 0).all()
    other = alike.clone()
    other[4, 0] += 0.1
    loss = manifold_loss(alike, other, found.ids, found.weight)
    assert torch.equal(loss > 0, (found.ids == 4).any(1))


def test_a_ball_of_similarity_one_holds_equal_embeddings() -> None:
    emb = 100 * torch.randn(64, 37, generator=torch.Generator().manual_seed(4))
    ref = ReferenceSet(emb, torch.rand(64, 4), torch.arange(64), (4,))
    found = neighbor_weights(emb, ref, RoMAConfig(eps=1.0, exclude_self=False))
    assert found.ids.flatten().tolist() == list(range(64))
    assert (found.weight == 1).all()
    none = neighbor_weights(emb + 1e-3, ref, RoMAConfig(eps=1.0, exclude_self=False))
    assert none.ids.shape == (64, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, "layers: expected a negative number for so many last routers, 'all', or a list of places, got 0"),
        ({"layers": "last"}, "layers: expected a negative number .*, got 'last'"),
        ({"layers": []}, "layers: expected one or more places, each once"),
        ({"layers": (1, 1)}, "layers: expected one or more places, each once"),
        ({"token": "mean"}, "token: expected 'last' or 'first', got 'mean'"),
        ({"weights": "all"}, "weights: expected 'full' or 'topk', got 'all'"),
        ({"k": 0}, "k: expected at least 1, an integer, got 0"),
        ({"k": 1.5}, "k: expected at least 1, an integer, got 1.5"),
        ({"eps": 1.5}, "eps: expected None or a similarity from 0 to 1, got 1.5"),
        ({"sigma": 0.0}, "sigma: expected a finite number above 0, with such a square, got 0.0"),
        ({"sigma": -1.0}, "sigma: expected a finite number above 0, with such a square, got -1.0"),
        ({"sigma": 1e-170}, "sigma: expected a finite number above 0, with such a square, got 1e-170"),
        ({"sigma": math.nan}, "sigma: expected a finite number above 0, with such a square, got nan"),
        ({"lam": -1.0}, "lam: expected a finite number of at least 0, got -1.0"),
        ({"refresh_every": -1}, "refresh_every: expected at least 0, an integer, got -1"),
        ({"refresh_every": 0.5}, "refresh_every: expected at least 0, an integer, got 0.5"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"RoMAConfig: {message}"):
        RoMAConfig(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"emb": torch.zeros(23, 5)}, r"emb: expected floating numbers of shape \(n, 6\) as the reference's, got torch.float32 \(23, 5\)"),
        ({"emb": torch.zeros(23, 6, dtype=torch.int64)}, "emb: expected floating numbers"),
        ({"emb": torch.full((23, 6), math.nan)}, "emb: expected finite numbers"),
        ({"keys": None}, r"keys: expected which samples these are, int64 of shape \(23,\), since exclude_self is set"),
        ({"keys": torch.zeros(3, dtype=torch.int64)}, r"keys: expected int64 of shape \(23,\), got torch.int64 \(3,\)"),
        ({"keys": torch.zeros(23)}, "keys: expected int64"),
    ],
)
def test_bad_queries(change: dict[str, Any], message: str) -> None:
    ref = _reference()
    arguments = {"emb": ref.emb, "ref": ref, "config": CONFIG, "keys": ref.keys, **change}
    with pytest.raises(ValueError, match=f"neighbor_weights: {message}"):
        neighbor_weights(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": torch.zeros(4, 8)}, r"r: expected floating numbers of shape \(23, ...\), got torch.float32 \(4, 8\)"),
        ({"r": torch.zeros(23, 7)}, r"experts: expected a sum of 7, the columns of r, got \(4, 4\)"),
        ({"r": torch.full((23, 8), math.inf)}, "r: expected finite numbers"),
        ({"emb": torch.zeros(23)}, "emb: expected floating numbers"),
        ({"keys": torch.zeros(23)}, r"keys: expected int64 of shape \(S,\), got torch.float32"),
    ],
)
def test_bad_reference_sets(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"ReferenceSet: {message}"):
        replace(_reference(), **change)


def test_an_empty_reference_set_is_refused() -> None:
    with pytest.raises(ValueError, match="keys: expected at least one sample, got none"):
        ReferenceSet(torch.zeros(0, 3), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), (4,))

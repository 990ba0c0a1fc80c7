"""Merges against plain numpy, to the bit where the arithmetic is the same."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy_merge import (
    Array,
    combine,
    keep_band,
    keep_by_word,
    l1_factor,
    parts_of,
    philox_4x32_10,
    rank_probabilities,
    tall_votes,
    vote_sum,
    words_of,
)

from taskloom._selection import band_ranks, name_key
from taskloom.merge import merge_state_dicts

SHAPES: dict[str, tuple[int, ...]] = {
    "b.weight": (37, 53),
    "a.conv": (5, 3, 2, 3),
    "c.bias": (19,),
    "d.one": (1,),
    "e.scalar": (),
    "f.empty": (0, 4),
    "g.row": (1, 1025),
}
SEED = 0x1234_5678_9ABC_DEF1
WEIGHTS = (0.5, 1.0, 0.25)
Model = dict[str, Array]


def _models(count: int = 3, dtype: Any = np.float32, tied: bool = True) -> tuple[Model, list[Model]]:
    """A base and its tunings; with ``tied`` magnitudes of deltas repeat."""
    random = np.random.default_rng(3)
    base = {name: np.asarray(np.round(random.normal(size=shape) * 4) / 4, dtype) for name, shape in SHAPES.items()}
    tuned = []
    for _ in range(count):
        deltas = {name: random.normal(size=shape) for name, shape in SHAPES.items()}
        if tied:
            deltas = {name: np.round(delta * 16) / 16 for name, delta in deltas.items()}
        tuned.append({name: np.asarray(base[name] + delta, dtype) for name, delta in deltas.items()})
    return base, tuned


def _deltas(base: Model, tuned: list[Model], name: str) -> list[Array]:
    return [np.asarray(model[name] - base[name]) for model in tuned]


def _assert_bits(got: Model, expected: Model) -> None:
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert got[name].shape == value.shape, name
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_philox_known_answers() -> None:
    """Vectors of the Random123 distribution (kat_vectors): counter and key all zeros, all ones, and digits of pi."""
    ones, pi = (2**64 - 1, 2**64 - 1, 4, 2**64 - 1), (0x299F31D0_A4093822, 0x03707344_13198A2E, 4, 0x85A308D3_243F6A88)
    expected = {
        (0, 0, 4, 0): "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ones: "408f276d 41c83b0e a20bc7c6 6d5451fd",
        pi: "d16cfe09 94fdcceb 5001e420 24126ea1",
    }
    for arguments, words in expected.items():
        assert " ".join(f"{word:08x}" for word in philox_4x32_10(*arguments)) == words


@pytest.mark.parametrize("rescale", ["none", "density", "l1"])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dare(method: str, rescale: str, dtype: Any) -> None:
    base, tuned = _models(dtype=dtype)
    densities = (0.3, 0.9, 1.0)
    merged = merge_state_dicts(base, tuned, method, seed=SEED, weight=WEIGHTS, density=densities, rescale=rescale, lambda_=0.75)
    for name, shape in SHAPES.items():
        deltas = _deltas(base, tuned, name)
        keeps = [keep_by_word(words_of(name_key(name), task, SEED, shape), density) for task, density in enumerate(densities)]
        factors: list[Array | float] = [1.0] * 3
        if rescale == "density":
            factors = [1 / density for density in densities]
        elif rescale == "l1":
            factors = [l1_factor(delta, keep) if np.abs(delta[keep]).sum() > 0 else 1.0 for delta, keep in zip(deltas, keeps, strict=True)]
        parts = parts_of(deltas, keeps, WEIGHTS, factors)
        elected = np.where(vote_sum(parts) >= 0, 1, -1).astype(dtype) if method == "dare_ties" else None
        expected = base[name] + dtype(0.75) * combine(parts, WEIGHTS, elected, normalize=False)
        if rescale == "l1":
            np.testing.assert_allclose(merged[name], expected, rtol=1e-6, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(merged[name], expected, err_msg=name)


@pytest.mark.parametrize("rescale", ["none", "density", "l1"])
@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della(method: str, rescale: str) -> None:
    base, tuned = _models()
    densities, epsilon = (0.3, 0.8, 0.5), 0.15
    merged = merge_state_dicts(base, tuned, method, seed=7, weight=WEIGHTS, density=densities, epsilon=epsilon, rescale=rescale)
    for name, shape in SHAPES.items():
        deltas = _deltas(base, tuned, name)
        probabilities = [
            rank_probabilities(delta, density, epsilon) if shape and shape[-1] > 1 else np.float32(density) * np.ones(shape, np.float32)
            for delta, density in zip(deltas, densities, strict=True)
        ]
        keeps = [keep_by_word(words_of(name_key(name), task, 7, shape), share) for task, share in enumerate(probabilities)]
        factors: list[Array | float] = [1.0] * 3
        if rescale == "density":
            factors = [np.float32(1) / share for share in probabilities]
        elif rescale == "l1":
            factors = [l1_factor(delta, keep) if np.abs(delta[keep]).sum() > 0 else 1.0 for delta, keep in zip(deltas, keeps, strict=True)]
        parts = parts_of(deltas, keeps, WEIGHTS, factors)
        elected = np.where(vote_sum(parts) >= 0, 1, -1).astype(np.float32) if method == "della" else None
        expected = base[name] + combine(parts, WEIGHTS, elected, normalize=method == "della")
        if rescale == "l1":
            np.testing.assert_allclose(merged[name], expected, rtol=1e-6, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(merged[name], expected, err_msg=name)


def _bands(deltas: dict[str, Array], scope: str, density: float, gamma: float | None) -> dict[str, Array]:
    """Keep masks of one task by the documented ranks; ``gamma`` None keeps the top, at least one entry of a segment."""

    def band(length: int) -> tuple[int, int]:
        if gamma is None:
            return band_ranks(length, density, at_least_one=True)
        return band_ranks(length, density, gamma, on_overflow="density")

    if scope == "tensor":
        return {name: keep_band(np.abs(delta), *band(delta.size)) for name, delta in deltas.items()}
    if scope == "row":
        # What has no dimension is no row: the official Breadcrumbs code leaves it whole.
        return {
            name: np.array(
                [keep_band(np.abs(row), *band(row.size)) for row in np.atleast_1d(delta).reshape(-1, delta.shape[-1] if delta.ndim else 1)],
                bool,
            ).reshape(delta.shape)
            | (delta.ndim == 0)
            for name, delta in deltas.items()
        }
    order = sorted(deltas)
    whole = np.concatenate([np.abs(deltas[name]).ravel() for name in order])
    keep = keep_band(whole, *band(whole.size))
    ends = np.cumsum([deltas[name].size for name in order])[:-1]
    return {name: part.reshape(deltas[name].shape) for name, part in zip(order, np.split(keep, ends), strict=True)}


@pytest.mark.parametrize("scope", ["tensor", "row", "model"])
@pytest.mark.parametrize("method", ["breadcrumbs", "magnitude", "ties"])
def test_magnitude_bands(method: str, scope: str) -> None:
    base, tuned = _models()
    densities = (0.5, 0.9, 0.25)
    gamma = {"gamma": 0.05} if method == "breadcrumbs" else {}
    settings: dict[str, Any] = {"weight": WEIGHTS, "density": densities, "scope": scope, "normalize": False, **gamma}
    merged = merge_state_dicts(base, tuned, method, **settings)
    keeps = [
        _bands({name: np.asarray(model[name] - base[name]) for name in SHAPES}, scope, density, gamma.get("gamma"))
        for model, density in zip(tuned, densities, strict=True)
    ]
    for name in SHAPES:
        parts = parts_of(_deltas(base, tuned, name), [keep[name] for keep in keeps], WEIGHTS, [1.0] * 3)
        elected = np.where(vote_sum(parts) >= 0, 1, -1).astype(np.float32) if method == "ties" else None
        np.testing.assert_array_equal(merged[name], base[name] + combine(parts, WEIGHTS, elected, normalize=False), err_msg=name)


def test_breadcrumbs_order_of_the_two_cuts() -> None:
    base, tuned = _models(1, tied=False)
    merged = merge_state_dicts(base, tuned, "breadcrumbs", weight=1.0, density=0.3, gamma=0.1, outliers_first=False)
    for name in SHAPES:
        (delta,) = _deltas(base, tuned, name)
        keep = keep_band(np.abs(delta), int(0.1 * delta.size), int(0.3 * delta.size))
        np.testing.assert_array_equal(merged[name], base[name] + np.where(keep, delta, np.float32(0)), err_msg=name)


@pytest.mark.parametrize("elect", ["sum", "count"])
@pytest.mark.parametrize("zero_sign", ["positive", "majority"])
def test_elections_and_their_zeros(elect: str, zero_sign: str) -> None:
    base, tuned = _models(2)
    for name in SHAPES:
        # Most entries go down, and a part of the votes is exactly zero.
        tuned[0][name] = np.asarray(tuned[0][name] - np.float32(0.5))
        tuned[1][name] = np.where(
            np.arange(base[name].size).reshape(base[name].shape) % 3 == 0, 2 * base[name] - tuned[0][name], tuned[1][name]
        )
    merged = merge_state_dicts(base, tuned, weight=1.0, elect=elect, zero_sign=zero_sign)
    deltas = {name: _deltas(base, tuned, name) for name in SHAPES}
    votes = {name: vote_sum(parts, elect == "count") for name, parts in deltas.items()}
    assert sum(int((vote == 0).sum()) for vote in votes.values()) > 100
    majority = sum(int(np.sign(vote).sum()) for vote in votes.values())
    assert majority < 0
    zero = -1 if zero_sign == "majority" else 1
    for name in SHAPES:
        elected = np.where(votes[name] == 0, zero, np.sign(votes[name])).astype(np.float32)
        expected = base[name] + combine(deltas[name], (1.0, 1.0), elected, normalize=True)
        np.testing.assert_array_equal(merged[name], expected, err_msg=name)


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("method", ["consensus_ta", "consensus_ties"])
def test_consensus(method: str, k: int) -> None:
    base, tuned = _models()
    thresholds = (0.4, 0.6, 0.2)
    merged = merge_state_dicts(base, tuned, method, weight=WEIGHTS, tall_mask_lambda=thresholds, consensus_k=k, lambda_=0.5)
    deltas = {name: _deltas(base, tuned, name) for name in SHAPES}
    parts = {name: parts_of(found, [np.ones(found[0].shape, bool)] * 3, WEIGHTS, [1.0] * 3) for name, found in deltas.items()}
    elected: dict[str, Array | None] = dict.fromkeys(SHAPES)
    if method == "consensus_ties":
        keeps = [_bands({name: deltas[name][task] for name in SHAPES}, "model", 0.2, None) for task in range(3)]
        parts = {name: parts_of(found, [keep[name] for keep in keeps], WEIGHTS, [1.0] * 3) for name, found in deltas.items()}
        votes = {name: vote_sum(found) for name, found in parts.items()}
        majority = -1 if sum(int(np.sign(vote).sum()) for vote in votes.values()) < 0 else 1
        elected = {name: np.where(vote == 0, majority, np.sign(vote)).astype(np.float32) for name, vote in votes.items()}
    for name in SHAPES:
        whole = combine(parts[name], WEIGHTS, elected[name], normalize=False)
        mask = tall_votes(deltas[name], WEIGHTS, whole, thresholds) >= k
        expected = base[name] + np.where(mask, np.float32(0.5) * whole, np.float32(0))
        np.testing.assert_array_equal(merged[name], expected, err_msg=name)
        if k == 4:
            np.testing.assert_array_equal(merged[name], base[name])


@pytest.mark.parametrize("normalize", [True, False])
def test_linear(normalize: bool) -> None:
    _, tuned = _models()
    merged = merge_state_dicts(None, tuned, "linear", weight=WEIGHTS, normalize=normalize)
    for name, shape in SHAPES.items():
        parts = [np.float32(weight) * model[name] for weight, model in zip(WEIGHTS, tuned, strict=True)]
        expected = combine([np.asarray(part) for part in parts], WEIGHTS, None, normalize)
        np.testing.assert_array_equal(merged[name], expected.reshape(shape), err_msg=name)


def test_passthrough_scales() -> None:
    base, _ = _models()
    scale = [{"filter": "weight", "value": 0.1}, {"value": 1.0}]
    merged = merge_state_dicts(None, [base], "passthrough", scale=scale)
    _assert_bits(merged, {name: np.asarray(value * np.float32(0.1 if "weight" in name else 1)) for name, value in base.items()})
    _assert_bits(merge_state_dicts(None, [base], "passthrough"), base)


def _as_torch(model: Model, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.asarray(value)).to(dtype) for name, value in model.items()}


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16, torch.float64])
def test_results_are_rounded_once_to_the_output_dtype(out: torch.dtype) -> None:
    base, tuned = _models(tied=False)
    merged = merge_state_dicts(base, tuned, weight=WEIGHTS, density=0.7)
    rounded = merge_state_dicts(_as_torch(base, torch.float32), tuned, weight=WEIGHTS, density=0.7, out_dtype=out)
    for name, value in merged.items():
        assert torch.equal(rounded[name], torch.from_numpy(value).to(out)), name


@pytest.mark.parametrize("method", ["ties", "dare_linear", "breadcrumbs_ties"])
def test_mixed_dtypes_are_merged_in_float32(method: str) -> None:
    base, tuned = _models(tied=False)
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    mixed = [_as_torch(model, kind) for model, kind in zip(tuned, kinds, strict=True)]
    widened = [{name: value.float().numpy() for name, value in model.items()} for model in mixed]
    settings = {"weight": WEIGHTS, "density": 0.6}
    _assert_bits(merge_state_dicts(base, mixed, method, **settings), merge_state_dicts(base, widened, method, **settings))


def test_passthrough_converts_copies() -> None:
    base, _ = _models(tied=False)
    source = _as_torch(base, torch.float32)
    converted = merge_state_dicts(None, [source], "passthrough", out_dtype="bfloat16")
    for name, value in source.items():
        assert torch.equal(converted[name], value.bfloat16())


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_ties", "ties"])
def test_64_tasks(method: str) -> None:
    base, tuned = _models(64)
    weights = [0.25 + 0.01 * task for task in range(64)]
    settings = {} if method == "task_arithmetic" else {"density": 0.5, "normalize": False}
    settings |= {"rescale": "none"} if method == "dare_ties" else {}
    merged = merge_state_dicts(base, tuned, method, weight=weights, **settings)
    for name, shape in SHAPES.items():
        deltas = _deltas(base, tuned, name)
        keeps = [np.ones(shape, bool)] * 64
        if method == "ties":
            keeps = [keep_band(np.abs(delta), *band_ranks(delta.size, 0.5, at_least_one=True)) for delta in deltas]
        elif method == "dare_ties":
            keeps = [keep_by_word(words_of(name_key(name), task, 0, shape), 0.5) for task in range(64)]
        parts = parts_of(deltas, keeps, weights, [1.0] * 64)
        elected = None if method == "task_arithmetic" else np.where(vote_sum(parts) >= 0, 1, -1).astype(np.float32)
        np.testing.assert_array_equal(merged[name], base[name] + combine(parts, weights, elected, normalize=False), err_msg=name)


@pytest.mark.parametrize("size", [1, 2, 511, 512, 513, 4097, 2**18 + 3])
@pytest.mark.parametrize("method", ["ties", "della_linear", "dare_linear"])
def test_sizes_around_blocks_and_chunks(method: str, size: int) -> None:
    random = np.random.default_rng(size)
    base = {"w": random.normal(size=size).astype(np.float32)}
    delta = np.round(random.normal(size=size) * 8).astype(np.float32) / 8
    tuned = {"w": base["w"] + delta}
    delta = tuned["w"] - base["w"]
    rescale = {} if method == "ties" else {"rescale": "none"}
    merged = merge_state_dicts(base, [tuned], method, weight=1.0, density=0.5, **rescale)
    if method == "ties":
        keep = keep_band(np.abs(delta), 0, max(1, math.floor(0.5 * size)))
    else:
        share: Array | float = rank_probabilities(delta, 0.5, 0.15) if method == "della_linear" and size > 1 else 0.5
        keep = keep_by_word(words_of(name_key("w"), 0, 0, (size,)), share)
    np.testing.assert_array_equal(merged["w"], base["w"] + np.where(keep, delta, np.float32(0)))

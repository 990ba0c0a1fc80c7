"""The same recipes through taskloom and through mergekit 0.1.5, which runs as a process in an environment of its own (make peers)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity import (
    PEERS,
    Selection,
    Tensors,
    bf16_ulp,
    is_contested,
    make_models,
    matches,
    merge_with_both,
    outcomes,
    read_llama,
    select_ranks,
)

from taskloom._selection import band_ranks

_ABSENT = f"no mergekit in {PEERS}: run make peers, or set TASKLOOM_PEERS"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (PEERS / "bin" / "mergekit-yaml").is_file(), reason=_ABSENT)]

WEIGHTS = (0.5, 0.3, 0.4)
BF16 = {"dtype": "float32", "out_dtype": "bfloat16"}
F32 = {"dtype": "float32"}


@pytest.fixture(scope="module")
def f32_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("f32"), "F32", seed=1)


@pytest.fixture(scope="module")
def bf16_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("bf16"), "BF16", seed=2)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Shows counts in the terminal and keeps them in the test report."""

    def show(title: str, **counts: int) -> None:
        for name, count in counts.items():
            record_property(name, count)
        with capsys.disabled():
            print(f"\n{title}: " + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items()))

    return show


def _recipe(
    method: str,
    models: dict[str, Path],
    own: dict[str, Any],
    dtypes: dict[str, str],
    weights: tuple[float, ...] = WEIGHTS,
    **parameters: Any,
) -> dict[str, Any]:
    """A recipe over the three tunings, each with a weight of its own besides the parameters ``own``."""
    recipe = {
        "merge_method": method,
        "base_model": str(models["base"]),
        "models": [
            {"model": str(models[label]), "parameters": {"weight": weight, **own}} for label, weight in zip("abc", weights, strict=True)
        ],
        **dtypes,
    }
    return recipe | ({"parameters": parameters} if parameters else {})


def _assert_close(ours: Tensors, peer: Tensors, relative: float = 1e-6) -> None:
    for name, expected in peer.items():
        # Near zero, base and delta cancel: there the float32 steps of the base are the measure.
        np.testing.assert_allclose(ours[name], expected, rtol=relative, atol=1e-8, err_msg=name)


def _assert_within_an_ulp(ours: Tensors, peer: Tensors) -> None:
    for name, expected in peer.items():
        assert np.all(np.abs(ours[name] - expected) <= bf16_ulp(np.maximum(np.abs(ours[name]), np.abs(expected)))), name


def _linear(models: dict[str, Path], dtypes: dict[str, str]) -> dict[str, Any]:
    weights = dict(zip(("base", "a", "b", "c"), (0.2, *WEIGHTS), strict=True))
    return {
        "merge_method": "linear",
        "models": [{"model": str(models[label]), "parameters": {"weight": weight}} for label, weight in weights.items()],
        **dtypes,
    }


def test_linear_and_task_arithmetic_agree_in_float32(f32_models: dict[str, Path], tmp_path: Path) -> None:
    for recipe in (_linear(f32_models, F32), _recipe("task_arithmetic", f32_models, {}, F32, **{"lambda": 0.7})):
        folder = tmp_path / recipe["merge_method"]
        folder.mkdir()
        _assert_close(*merge_with_both(recipe, folder))


def test_linear_and_task_arithmetic_agree_to_a_bfloat16_ulp(bf16_models: dict[str, Path], tmp_path: Path) -> None:
    for recipe in (_linear(bf16_models, BF16), _recipe("task_arithmetic", bf16_models, {}, BF16)):
        folder = tmp_path / recipe["merge_method"]
        folder.mkdir()
        _assert_within_an_ulp(*merge_with_both(recipe, folder))


SPARSE = {
    # name: method, parameters of every model, of the recipe
    "ties": ("ties", {"density": 0.3}, {}),
    "ties_sum": ("ties", {"density": 0.6}, {"normalize": False}),
    "breadcrumbs": ("breadcrumbs", {"density": 0.5}, {}),
    "breadcrumbs_outliers": ("breadcrumbs", {"density": 0.9, "gamma": 0.05}, {}),
    "breadcrumbs_full": ("breadcrumbs", {"density": 0.9, "gamma": 0.2}, {}),
    "breadcrumbs_ties": ("breadcrumbs_ties", {"density": 0.5, "gamma": 0.05}, {}),
}


def _selections(method: str, own: dict[str, float], deltas: list[np.ndarray]) -> list[Selection]:
    """The entries that the recipe keeps of one tensor's deltas."""
    size = deltas[0].size
    if method == "ties":
        ranks = band_ranks(size, own["density"], at_least_one=True)
    else:
        ranks = band_ranks(size, own["density"], own.get("gamma", 0.01), on_overflow="density")
    return [select_ranks(delta, *ranks) for delta in deltas]


@pytest.mark.parametrize("case", SPARSE)
def test_bfloat16_results_differ_only_where_the_inputs_leave_them_open(
    case: str, bf16_models: dict[str, Path], tmp_path: Path, say: Callable[..., None]
) -> None:
    """Both results are, entry by entry, among those that some order of tied magnitudes and some order of a sum give.

    mergekit sorts unstably, so of equal magnitudes at a cut it keeps any; and a sum within rounding of zero may have either sign.
    """
    method, own, shared = SPARSE[case]
    elect = method.endswith("ties")
    normalize = method == "ties" and shared.get("normalize", True)
    ours, peer = merge_with_both(_recipe(method, bf16_models, own, BF16, **shared), tmp_path)
    base, *tuned = (read_llama(bf16_models[label]) for label in ("base", "a", "b", "c"))
    still_open = differing = tied = near_zero = rounded = 0
    for name, origin in base.items():
        deltas = [model[name] - origin for model in tuned]
        selections = _selections(method, own, deltas)
        slack = 2.0**-21 * (np.abs(origin) + sum(np.abs(delta) for delta in deltas)).astype(np.float64)
        possible = outcomes(origin, deltas, selections, WEIGHTS, elect, normalize)
        for got in (ours[name], peer[name]):
            assert np.all(np.logical_or.reduce([matches(got, outcome, slack) for outcome in possible])), name
        contest = is_contested(deltas, selections, WEIGHTS, elect)
        unlike = ours[name] != peer[name]
        apart = np.abs(ours[name] - peer[name]) > bf16_ulp(np.maximum(np.abs(ours[name]), np.abs(peer[name])))
        assert not np.any(apart & ~contest.tied & ~contest.near_zero), name
        still_open += np.count_nonzero(contest.tied | contest.near_zero)
        differing += np.count_nonzero(unlike)
        tied += np.count_nonzero(unlike & contest.tied)
        near_zero += np.count_nonzero(unlike & contest.near_zero & ~contest.tied)
        rounded += np.count_nonzero(unlike & ~contest.near_zero & ~contest.tied)
    entries = sum(values.size for values in base.values())
    say(
        case,
        entries=entries,
        left_open=still_open,
        differing=differing,
        tied_at_a_cut=tied,
        elections_near_zero=near_zero,
        rounding_of_the_output=rounded,
    )


def test_elections_of_exactly_zero_go_to_the_positive_sign(bf16_models: dict[str, Path], tmp_path: Path, say: Callable[..., None]) -> None:
    """With equal weights many sums of bfloat16 deltas are exactly zero, and with nothing cut off nothing else is open."""
    ours, peer = merge_with_both(_recipe("ties", bf16_models, {}, BF16, weights=(1.0, 1.0, 1.0)), tmp_path)
    base, *tuned = (read_llama(bf16_models[label]) for label in ("base", "a", "b", "c"))
    zero = 0
    for name, origin in base.items():
        deltas = np.stack([model[name] - origin for model in tuned]).astype(np.float64)
        zero += np.count_nonzero((deltas.sum(axis=0) == 0) & np.any(deltas != 0, axis=0))
        np.testing.assert_array_equal(ours[name], peer[name], err_msg=name)
    say("ties at equal weights", elections_of_exactly_zero=zero)
    assert zero > 0


@pytest.mark.parametrize("case", [*SPARSE, "ties_everything"])
def test_float32_results_agree_where_nothing_is_tied(case: str, f32_models: dict[str, Path], tmp_path: Path) -> None:
    """Without ties and with election sums away from zero the methods, defaults included, are the same ones."""
    method, own, shared = SPARSE.get(case, ("ties", {}, {}))
    base, *tuned = (read_llama(f32_models[label]) for label in ("base", "a", "b", "c"))
    contested = 0
    for name, origin in base.items():
        deltas = [model[name] - origin for model in tuned]
        selections = _selections(method, {"density": 1.0} | own, deltas)
        contest = is_contested(deltas, selections, WEIGHTS, method.endswith("ties"))
        contested += np.count_nonzero(contest.tied | contest.near_zero)
    assert contested == 0
    _assert_close(*merge_with_both(_recipe(method, f32_models, own, F32, **shared), tmp_path))


@pytest.mark.parametrize("t", [0.3, [0.0, 0.9]])
def test_slerp_agrees(t: Any, f32_models: dict[str, Path], tmp_path: Path) -> None:
    recipe = {
        "merge_method": "slerp",
        "base_model": str(f32_models["base"]),
        "models": [{"model": str(f32_models["base"])}, {"model": str(f32_models["a"])}],
        "parameters": {"t": t},
        **F32,
    }
    ours, peer = merge_with_both(recipe, tmp_path)
    for name, expected in peer.items():
        np.testing.assert_allclose(ours[name], expected, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("scale", [None, 0.5])
def test_passthrough_is_the_same_bits(scale: float | None, bf16_models: dict[str, Path], tmp_path: Path) -> None:
    own = {} if scale is None else {"parameters": {"scale": scale}}
    ours, peer = merge_with_both({"merge_method": "passthrough", "models": [{"model": str(bf16_models["a"]), **own}]}, tmp_path)
    for name, expected in peer.items():
        np.testing.assert_array_equal(ours[name], expected, err_msg=name)


def test_gradients_and_filters_give_every_tensor_the_same_weight(f32_models: dict[str, Path], tmp_path: Path) -> None:
    weights = {
        "a": [0, 1],
        "b": [{"filter": "self_attn", "value": 0.25}, {"filter": "mlp", "value": [0.1, 0.9, 0.3]}, {"value": 0.5}],
        "c": [{"filter": "layernorm", "value": [1, 0]}, {"filter": "embed", "value": 0.7}, {"filter": "*", "value": 0.2}],
    }
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(f32_models["base"]),
        "models": [{"model": str(f32_models[label]), "parameters": {"weight": weight}} for label, weight in weights.items()],
        "parameters": {"lambda": [1.0, 0.5]},
        **F32,
    }
    ours, peer = merge_with_both(recipe, tmp_path)
    _assert_close(ours, peer)
    base = read_llama(f32_models["base"])
    last = "model.layers.3.self_attn.q_proj.weight"
    deltas = [read_llama(f32_models[label])[last] - base[last] for label in "abc"]
    expected = base[last] + 0.5 * (deltas[0] + 0.25 * deltas[1] + 0.2 * deltas[2])
    np.testing.assert_allclose(ours[last], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_random_masks_keep_the_same_share_and_norm(method: str, f32_models: dict[str, Path], tmp_path: Path) -> None:
    """The masks themselves are drawn by different generators, so only what they promise is compared: density and L1 norm."""
    recipe = {
        "merge_method": method,
        "base_model": str(f32_models["base"]),
        "models": [{"model": str(f32_models["a"]), "parameters": {"weight": 1.0, "density": 0.5}}],
        **F32,
    }
    base, tuned = read_llama(f32_models["base"]), read_llama(f32_models["a"])
    for merged in merge_with_both(recipe, tmp_path):
        for name, origin in base.items():
            delta = (merged[name] - origin).astype(np.float64)
            kept = np.count_nonzero(delta) / delta.size
            assert abs(kept - 0.5) <= 5 * 0.5 / np.sqrt(delta.size), name
            norm = np.abs(tuned[name] - origin).sum(dtype=np.float64)
            assert np.abs(delta).sum() == pytest.approx(norm, rel=1e-4), name

"""Ranks of densities, values by layer and filter, and the checks that need a tensor's own numbers."""

from __future__ import annotations

from typing import Any

import pytest

from taskloom._selection import band_ranks
from taskloom.merge.errors import RecipeError
from taskloom.merge.parameters import layer_positions
from taskloom.merge.plan import Stages
from taskloom.merge.recipe import load_recipe
from taskloom.merge.resolve import Task, check_uniform_selection, segment_length, tensor_stages


def _stages(
    method: str, name: str = "model.layers.1.mlp.weight", shape: tuple[int, ...] = (10, 20), layers: int = 3, **parameters: Any
) -> Stages | None:
    own = parameters.pop("own", [{"weight": 0.5}, {"weight": 0.5}])
    recipe = load_recipe(
        {
            "merge_method": method,
            "base_model": "base",
            "models": [{"model": f"m{number}", "parameters": values} for number, values in enumerate(own)],
            "parameters": parameters,
        }
    )
    names = {name, "model.norm.weight", *(f"model.layers.{layer}.mlp.weight" for layer in range(layers))}
    tasks = [Task(model.label, model.settings) for model in recipe.models]
    return tensor_stages(recipe.method, recipe.settings, tasks, name, shape, layer_positions(names)[name], 1000)


def _some(*arguments: Any, **keywords: Any) -> Stages:
    stages = _stages(*arguments, **keywords)
    assert stages is not None
    return stages


@pytest.mark.parametrize(
    ("numel", "density", "gamma", "options", "expected"),
    [
        (100, 0.29, 0.0, {}, (0, 28)),
        (100, 0.5, 0.1, {}, (10, 60)),
        (100, 0.95, 0.1, {}, (10, 100)),
        (100, 0.95, 0.1, {"on_overflow": "density"}, (5, 100)),
        (64, 0.9, 0.01, {}, (0, 57)),
        (3, 0.1, 0.0, {}, (0, 0)),
        (3, 0.1, 0.0, {"at_least_one": True}, (0, 1)),
        (3, 0.0, 0.0, {"at_least_one": True}, (0, 0)),
        (0, 0.5, 0.1, {"at_least_one": True}, (0, 0)),
        (10, 0.5, 1.0, {}, (10, 10)),
        (10, 1.0, 0.0, {}, (0, 10)),
    ],
)
def test_band_ranks(numel: int, density: float, gamma: float, options: dict[str, Any], expected: tuple[int, int]) -> None:
    assert band_ranks(numel, density, gamma, **options) == expected


def test_segments() -> None:
    assert segment_length("tensor", (4, 6), 100) == 24
    assert segment_length("row", (4, 6), 100) == 6
    assert segment_length("model", (4, 6), 100) == 100
    assert segment_length("row", (), 100) == 1


def test_gradients_follow_the_layers_and_filters_the_names() -> None:
    gradient = {"weight": [0.0, 1.0]}
    for layer, weight in enumerate((0.0, 0.5, 1.0)):
        assert _some("task_arithmetic", f"model.layers.{layer}.mlp.weight", own=[gradient, {"weight": 2}]).weight == (weight, 2.0)
    assert _some("task_arithmetic", "model.norm.weight", own=[gradient, gradient]).weight == (0.0, 0.0)
    filtered = {"weight": [{"filter": "norm", "value": 3}, {"filter": "layers.1.", "value": [1, 2]}, {"value": 7}]}
    names = ("model.norm.weight", "model.layers.1.mlp.weight", "model.layers.2.mlp.weight")
    assert [_some("task_arithmetic", name, own=[filtered]).weight for name in names] == [(3.0,), (1.5,), (7.0,)]


def test_a_models_own_value_goes_before_the_recipes() -> None:
    stages = _some("dare_linear", own=[{"weight": 1, "density": 0.2}, {"weight": 1}], density=0.7)
    assert stages.density == (0.2, 0.7)


def test_a_value_without_a_matching_filter_is_missing() -> None:
    with pytest.raises(RecipeError, match=r"'weight' of model 'm0' has no value for tensor 'model.layers.1.mlp.weight'"):
        _stages("task_arithmetic", own=[{"weight": [{"filter": "norm", "value": 1}]}])


def test_one_layer_is_at_the_end_of_a_gradient() -> None:
    positions = layer_positions(["h.0.w", "encoder.layer.0.w", "encoder.layer.4.w", "norm"])
    assert [(position.layer, position.t) for position in positions.values()] == [(0, 1.0), (0, 0.0), (4, 1.0), (None, 0.0)]


def test_everything_kept_needs_no_selection() -> None:
    for method in ("ties", "dare_linear", "della", "breadcrumbs", "magnitude"):
        assert _some(method, own=[{"weight": 1}], density=1.0).select == "all"
    assert _some("breadcrumbs", own=[{"weight": 1}], density=1.0, on_overflow="drop").select == "magnitude"


@pytest.mark.parametrize(
    ("density", "epsilon", "fits"),
    [(0.5, 0.49, True), (0.5, 0.5, False), (0.1, 0.15, False), (0.9, 0.1, False), (1.0, 0.15, True), (0.0, 0.15, True)],
)
def test_della_needs_probabilities_inside_0_and_1(density: float, epsilon: float, fits: bool) -> None:
    own = [{"weight": 1, "density": density, "epsilon": epsilon}, {"weight": 1, "density": 0.5}]
    if fits:
        spread = epsilon if 0 < density < 1 else 0.0
        assert _some("della", own=own).epsilon == (spread, 0.15)
        return
    with pytest.raises(RecipeError, match=r"epsilon .* of model 'm0' for tensor .* inside \(0, 1\)"):
        _stages("della", own=own)


def test_della_has_no_ranks_in_rows_of_one() -> None:
    assert _some("della", shape=(5, 1), density=0.5).epsilon == (0.0, 0.0)


@pytest.mark.parametrize(
    ("method", "parameters", "combine"),
    [
        ("ties", {}, "disjoint_mean"),
        ("ties", {"normalize": False}, "sum"),
        ("task_arithmetic", {"normalize": True}, "weighted_mean"),
        ("task_arithmetic", {}, "sum"),
        ("linear", {}, "weighted_mean"),
        ("consensus_ties", {}, "sum"),
    ],
)
def test_how_deltas_are_combined(method: str, parameters: dict[str, Any], combine: str) -> None:
    assert _some(method, **parameters).combine == combine


def test_weights_that_cancel() -> None:
    own = [{"weight": 1}, {"weight": -1}]
    assert _some("task_arithmetic", own=own, normalize=True).combine == "sum"
    with pytest.raises(RecipeError, match="weights sum to zero"):
        _stages("linear", own=own)


def test_rescale_by_density_needs_a_probability() -> None:
    assert _some("dare_ties", density=0.5, rescale="density").rescale == "density"
    assert _some("ties", density=0.5, rescale=True).rescale == "l1"
    assert _some("ties", density=1.0, rescale=True).rescale == "none"
    with pytest.raises(RecipeError, match="keep probability, which ties does not have"):
        _stages("ties", density=0.5, rescale="density")


def test_passthrough_copies_or_scales() -> None:
    assert _stages("passthrough", own=[{}]) is None
    assert _stages("passthrough", own=[{"scale": 2}]) == Stages(weight=(2.0,))


def test_one_ranking_of_the_whole_model_has_one_band() -> None:
    one = Stages(weight=(1.0, 1.0), select="magnitude", scope="model", rank_begin=(0, 0), rank_end=(10, 20))
    other = Stages(weight=(0.5, 1.0), select="magnitude", scope="model", rank_begin=(0, 0), rank_end=(10, 30))
    everything = Stages(weight=(1.0, 1.0))
    tasks = [Task("m0", {}), Task("m1", {})]
    check_uniform_selection({"a": one, "b": one}, tasks)
    with pytest.raises(RecipeError, match="'m1' differ between tensors 'a' and 'b'"):
        check_uniform_selection({"a": one, "b": other}, tasks)
    with pytest.raises(RecipeError, match="'m0' differ"):
        check_uniform_selection({"a": everything, "b": one}, tasks)

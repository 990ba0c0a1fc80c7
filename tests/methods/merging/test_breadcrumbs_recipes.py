"""merge_breadcrumbs and taskloom merge give the same bits for the same settings; mergekit's recipes are read as they are."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from breadcrumbs_models import State, assert_same_bits, by_formula, models, sorted_mask
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from taskloom.cli.main import taskloom
from taskloom.merge import RecipeError, merge_checkpoints, merge_state_dicts
from taskloom.merge.recipe import load_recipe
from taskloom.methods.merging.breadcrumbs import merge_breadcrumbs

PER_MODEL: dict[str, list[float]] = {"weight": [0.5, -0.25, 0.3], "density": [0.3, 0.9, 0.15], "gamma": [0.05, 0.2, 0.0]}
CANCELLING: dict[str, list[float]] = {**PER_MODEL, "weight": [0.1, 0.2, -0.3]}


def _save(folder: Path, base: State, tuned: list[State]) -> dict[str, Any]:
    """Checkpoints, and the part of a recipe that names them."""
    for name, state in {"base": base, **{f"m{number}": one for number, one in enumerate(tuned)}}.items():
        (folder / name).mkdir()
        save_file(state, folder / name / "model.safetensors")
    return {"base_model": str(folder / "base"), "models": [{"model": str(folder / f"m{number}")} for number in range(len(tuned))]}


def _merged(folder: Path, recipe: Mapping[str, Any]) -> State:
    merge_checkpoints(recipe, folder / "out")
    return load_file(folder / "out" / "model.safetensors")


def _by_library(base: State, tuned: list[State], **settings: Any) -> State:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="merge_breadcrumbs: (nothing|fewer)")
        return merge_breadcrumbs(base, tuned, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("method", "own", "shared", "arguments"),
    [
        ("breadcrumbs", PER_MODEL, {}, {"on_overflow": "density"}),
        ("breadcrumbs", PER_MODEL, {"on_overflow": "drop"}, {}),
        ("breadcrumbs", PER_MODEL, {"granularity": "row", "on_overflow": "drop"}, {"granularity": "row"}),
        ("breadcrumbs", PER_MODEL, {"outliers_first": False}, {"outliers_first": False}),
        ("breadcrumbs", PER_MODEL, {"normalize": True, "lambda": 0.7, "on_overflow": "drop"}, {"normalize": True, "lambda_": 0.7}),
        ("breadcrumbs", CANCELLING, {"normalize": True, "on_overflow": "drop"}, {"normalize": True}),
        ("breadcrumbs_ties", PER_MODEL, {"on_overflow": "drop"}, {"sign_consensus": True}),
        (
            "breadcrumbs_ties",
            PER_MODEL,
            {"normalize": True, "scope": "row", "lambda": 1.5, "on_overflow": "drop"},
            {"sign_consensus": True, "normalize": True, "granularity": "row", "lambda_": 1.5},
        ),
        ("breadcrumbs", {"weight": [1.0] * 3, "density": [1.0] * 3, "gamma": [0.01] * 3}, {}, {"on_overflow": "density"}),
        ("breadcrumbs", {"weight": [1.0] * 3, "density": [1.0] * 3, "gamma": [0.01] * 3}, {"on_overflow": "drop"}, {}),
    ],
)
def test_library_and_recipe_give_the_same_bits(
    tmp_path: Path,
    method: str,
    own: dict[str, list[float]],
    shared: dict[str, Any],
    arguments: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    base, tuned = models(3, dtype, tied=dtype == torch.float32)
    recipe = {"merge_method": method, "parameters": shared, **_save(tmp_path, base, tuned)}
    for number, model in enumerate(recipe["models"]):
        model["parameters"] = {name: values[number] for name, values in own.items()}
    by_recipe = _merged(tmp_path, recipe)
    by_library = _by_library(base, tuned, **own, **arguments)
    assert_same_bits({name: by_recipe[name] for name in base}, by_library)
    assert_same_bits(merge_state_dicts(base, tuned, method, **own, **shared), by_library)


MERGEKIT_RECIPE = """
merge_method: METHOD
base_model: BASE
models:
  - model: M0
    parameters:
      weight: 0.5
      density: 0.9
      gamma: 0.01
  - model: M1
    parameters:
      weight:
        - filter: mlp
          value: [0.2, 0.8]
        - value: 0.4
      density: [0.3, 0.6]
      gamma:
        - filter: conv
          value: 0.1
        - value: 0.02
parameters:
  normalize: false
  int8_mask: true
  lambda: 1.1
dtype: float32
"""
LAYER = {"model.layers.0.": 0.0, "model.layers.1.": 1.0}


def _gradient(first: float, last: float, name: str) -> float:
    place = next((place for prefix, place in LAYER.items() if name.startswith(prefix)), 0.0)
    return (1 - place) * first + place * last


def _settings_of_the_recipe() -> dict[str, Callable[[str, int], float]]:
    """The recipe's numbers for each tensor and model."""

    def weight(name: str, model: int) -> float:
        return 0.5 if model == 0 else _gradient(0.2, 0.8, name) if "mlp" in name else 0.4

    def density(name: str, model: int) -> float:
        return 0.9 if model == 0 else _gradient(0.3, 0.6, name)

    def gamma(name: str, model: int) -> float:
        return 0.01 if model == 0 else 0.1 if "conv" in name else 0.02

    return {"weight": weight, "density": density, "gamma": gamma}


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("extra", ["", "granularity: row", "scope: row"])
def test_a_recipe_of_mergekit_with_gradients_and_filters(tmp_path: Path, method: str, extra: str) -> None:
    base, tuned = models(2, tied=True)
    paths = _save(tmp_path, base, tuned)
    text = MERGEKIT_RECIPE.replace("METHOD", method).replace("BASE", paths["base_model"])
    for number, model in enumerate(paths["models"]):
        text = text.replace(f"M{number}\n", f"{model['model']}\n")
    text = text.replace("  int8_mask", f"  {extra}\n  int8_mask") if extra else text
    (tmp_path / "recipe.yml").write_text(text)
    done = CliRunner().invoke(taskloom, ["merge", str(tmp_path / "recipe.yml"), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    got = load_file(tmp_path / "out" / "model.safetensors")
    settings: dict[str, Any] = {"granularity": "row" if extra else "tensor", "on_overflow": "density", "lambda_": 1.1}
    expected = _by_library(base, tuned, sign_consensus=method == "breadcrumbs_ties", **_settings_of_the_recipe(), **settings)
    assert_same_bits({name: got[name] for name in base}, expected)


def test_mergekits_defaults_keep_everything(tmp_path: Path) -> None:
    """Density 1 and gamma 0.01: mergekit returns the delta untouched."""
    base, tuned = models(2)
    recipe = {"merge_method": "breadcrumbs", "parameters": {"weight": 0.5}, **_save(tmp_path, base, tuned)}
    merged = _merged(tmp_path, recipe)
    assert_same_bits({name: merged[name] for name in base}, merge_breadcrumbs(base, tuned, weight=0.5, density=1.0, gamma=0.0))


def test_a_gamma_below_one_entry_keeps_the_band(tmp_path: Path) -> None:
    """Before 0.1.5 mergekit slices to -0 here, which makes the whole delta zero."""
    base, tuned = models(1)
    for gamma in (0.0, 0.01):
        merged = merge_state_dicts(base, tuned, "breadcrumbs", weight=1.0, density=0.15, gamma=gamma)
        assert int((merged["model.norm.bias"] != base["model.norm.bias"]).sum()) == int(0.15 * 64)


def test_granularity_is_a_name_of_scope() -> None:
    def scope(parameters: dict[str, Any], method: str = "breadcrumbs") -> Any:
        recipe = {"merge_method": method, "base_model": "b", "models": [{"model": "m", "parameters": {"weight": 1}}]}
        return load_recipe({**recipe, "parameters": parameters}).settings["scope"][0].values

    assert scope({"granularity": "row"}) == scope({"scope": "row"}) == ("row",)
    assert scope({"granularity": "tensor"}, "breadcrumbs_ties") == ("tensor",)
    with pytest.raises(RecipeError, match="scope and granularity are two names of one parameter"):
        scope({"granularity": "row", "scope": "row"})
    with pytest.raises(RecipeError, match=r"parameters.granularity: expected one of tensor, row, model, got 'rows'; did you mean 'row'"):
        scope({"granularity": "rows"})
    with pytest.raises(RecipeError, match=r"takes one value for the whole merge"):
        scope({"granularity": ["row", "tensor"]})
    with pytest.raises(RecipeError, match=r"ties has no parameter 'granularity'.*belongs to breadcrumbs, breadcrumbs_ties"):
        scope({"granularity": "row"}, "ties")


def test_the_printed_templates_are_recipes() -> None:
    for method in ("breadcrumbs", "breadcrumbs_ties"):
        done = CliRunner().invoke(taskloom, ["merge", "--init", method])
        assert done.exit_code == 0, done.output
        assert load_recipe(yaml.safe_load(done.output)).method.name == method


def test_a_tensor_without_dimensions_has_no_row() -> None:
    base, tuned = models(2)
    for density, kept in ((0.15, True), (0.0, False)):
        merged = merge_state_dicts(base, tuned, "breadcrumbs", weight=1.0, density=density, granularity="row")
        changes = sum(one["model.scale"] - base["model.scale"] for one in tuned)
        torch.testing.assert_close(merged["model.scale"], base["model.scale"] + (changes if kept else 0))


@pytest.mark.parametrize("seed", range(40))
def test_any_merge_is_the_sorted_formula(seed: int) -> None:
    """Ties, zeros and subnormal deltas in all dtypes, segments of one and three entries, shares that do not fit."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = draw.choice([torch.bfloat16, torch.float16, torch.float32])
    shape = draw.choice([(3,), (1,), (64,), (7, 5, 3, 3), (1, 9), (9, 1), (150, 130), (2, 20000)])
    step = draw.choice([1.0, 1e-3, 0.0, 1e-40, 1e-7])
    base = (torch.zeros if step < 1e-6 else torch.ones)(shape).to(dtype)
    drawn = [(torch.randn(shape, generator=generator) * 4).round() / 8 for _ in range(3)]
    tuned = [(base.float() + (step or 1) * torch.where(values.abs() > 0.3, values, step * values)).to(dtype) for values in drawn]
    weights, densities, gammas = (
        [draw.choice(choices) for _ in tuned]
        for choices in ([0.3, 1.0, -0.5], [0.01, 0.15, 0.29, 0.34, 0.9, 1.0], [0.0, 0.006, 0.01, 0.2, 0.5])
    )
    row, first, overflow = draw.random() < 0.5, draw.random() < 0.7, draw.choice(["drop", "density"])
    length = shape[-1] if row else math.prod(shape)
    masks = []
    for one, density, gamma in zip(tuned, densities, gammas, strict=True):
        top, kept = int(gamma * length), int(density * length)
        if not first:
            begin, end = top, max(top, kept)
        elif overflow == "density":
            begin, end = min(top, length - kept), min(top, length - kept) + kept
        else:
            begin, end = top, min(length, top + kept)
        masks.append(sorted_mask(one.float() - base.float(), begin, end, row))
    settings: dict[str, Any] = {"weight": weights, "density": densities, "gamma": gammas, "granularity": "row" if row else "tensor"}
    settings |= {"outliers_first": first, "on_overflow": overflow}
    expected = by_formula(base, tuned, masks, weights)
    named = [{"w": one} for one in tuned]
    assert merge_state_dicts({"w": base}, named, "breadcrumbs", **settings)["w"].equal(expected)
    assert _by_library({"w": base}, named, **settings)["w"].equal(expected)

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from taskloom.merge.errors import RecipeError
from taskloom.merge.parameters import Rule
from taskloom.merge.recipe import load_recipe
from taskloom.merge.stages import METHODS, REQUIRED
from taskloom.merge.templates import recipe_template

# Read from mergekit 0.1.5: merge_methods/registry.py, generalized_task_arithmetic.py, linear.py, slerp.py, passthrough.py.
_DELTA = {"weight": REQUIRED, "int8_mask": False, "lambda": 1.0, "density": 1.0}
MERGEKIT_DEFAULTS: dict[str, dict[str, Any]] = {
    "linear": {"weight": REQUIRED, "normalize": True},
    "slerp": {"t": REQUIRED},
    "passthrough": {"scale": None},
    "task_arithmetic": _DELTA | {"normalize": False, "rescale": "none"},
    "ties": _DELTA | {"normalize": True, "rescale": "none"},
    "dare_linear": _DELTA | {"normalize": False, "rescale": "l1"},
    "dare_ties": _DELTA | {"normalize": False, "rescale": "l1"},
    "della": _DELTA | {"normalize": True, "rescale": "l1", "epsilon": 0.15},
    "della_linear": _DELTA | {"normalize": False, "rescale": "l1", "epsilon": 0.15},
    "breadcrumbs": _DELTA | {"normalize": False, "rescale": "none", "gamma": 0.01},
    "breadcrumbs_ties": _DELTA | {"normalize": False, "rescale": "none", "gamma": 0.01},
}
PER_MODEL = {"weight", "density", "gamma", "epsilon", "scale", "tall_mask_lambda"}


def _recipe(method: str = "ties", **changes: Any) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "merge_method": method,
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"weight": 0.5}}, {"model": "b", "parameters": {"weight": 0.5}}],
    }
    recipe |= changes
    return {key: value for key, value in recipe.items() if value is not ...}


@pytest.mark.parametrize("name", MERGEKIT_DEFAULTS)
def test_defaults_are_mergekits(name: str) -> None:
    defaults = {parameter.name: parameter.default for parameter in METHODS[name].parameters}
    assert {key: defaults[key] for key in MERGEKIT_DEFAULTS[name]} == MERGEKIT_DEFAULTS[name]


def test_parameters_sit_where_mergekit_has_them() -> None:
    for method in METHODS.values():
        for parameter in method.parameters:
            assert parameter.per_model == (parameter.name in PER_MODEL), (method.name, parameter.name)


def test_consensus_defaults() -> None:
    ties = {parameter.name: parameter.default for parameter in METHODS["consensus_ties"].parameters}
    assert ties == {
        "weight": 1.0,
        "density": 0.2,
        "tall_mask_lambda": 0.4,
        "consensus_k": 2,
        "scope": "model",
        "elect": "sum",
        "zero_sign": "majority",
        "lambda": 1.0,
    }


def test_reads_a_mergekit_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(
        """
models:
  - model: base
  - model: a
    parameters:
      density: [1, 0.7, 1e-1]
      weight:
        - filter: mlp
          value: 0.3
        - value: 1
merge_method: dare_ties
base_model: base
parameters:
  normalize: 1.0
  int8_mask: true
  rescale: false
dtype: float16
out_dtype: torch.bfloat16
"""
    )
    recipe = load_recipe(path)
    assert recipe.models[1].settings["density"] == (Rule(None, (1.0, 0.7, 0.1)),)
    assert recipe.models[1].settings["weight"] == (Rule("mlp", (0.3,)), Rule(None, (1.0,)))
    assert recipe.settings["normalize"] == (Rule(None, (True,)),)
    assert recipe.settings["rescale"] == (Rule(None, ("none",)),)
    assert recipe.output_dtype == "BF16"
    assert recipe.folder == tmp_path
    assert recipe.notes == ("int8_mask has no effect in dare_ties",)


@pytest.mark.parametrize(
    ("value", "meaning"), [(True, "l1"), (False, "none"), (1.0, "l1"), ("true", "l1"), ("density", "density"), ("l1", "l1")]
)
def test_spellings_of_rescale(value: object, meaning: str) -> None:
    recipe = load_recipe(_recipe("dare_ties", parameters={"rescale": value}))
    assert recipe.settings["rescale"] == (Rule(None, (meaning,)),)


def test_python_spellings() -> None:
    recipe = load_recipe(_recipe(models=[{"model": Path("a"), "parameters": {"weight": (0.0, 1.0)}}]))
    assert recipe.models[0].label == "a"
    assert recipe.models[0].settings["weight"] == (Rule(None, (0.0, 1.0)),)


WRONG = {
    "method": (_recipe("tiess"), "merge_method 'tiess' is unknown.*did you mean 'ties'"),
    "method of mergekit": (_recipe("model_stock"), "'model_stock' of mergekit is not offered"),
    "key": (_recipe(base_modle="x"), "unknown key 'base_modle'.*did you mean 'base_model'"),
    "key of a model": (_recipe(models=[{"modle": "a"}]), r"models\[0\]: unknown key 'modle'.*did you mean 'model'"),
    "parameter": (_recipe(parameters={"densty": 0.5}), "no parameter 'densty'.*did you mean 'density'"),
    "parameter of another": (_recipe(parameters={"consensus_k": 2}), "'consensus_k' belongs to consensus_ta, consensus_ties"),
    "shared under a model": (_recipe(models=[{"model": "a", "parameters": {"normalize": True}}]), "'normalize' holds for the whole merge"),
    "key of a filter": (_recipe(parameters={"density": [{"filtre": "x", "value": 1}]}), "unknown key 'filtre'.*did you mean 'filter'"),
    "filter without a value": (_recipe(parameters={"density": [{"filter": "x"}]}), "needs a value"),
    "mixed list": (_recipe(parameters={"density": [0.5, {"filter": "x", "value": 1}]}), "do not mix"),
    "empty gradient": (_recipe(parameters={"density": []}), "empty list"),
    "text": (_recipe(parameters={"density": "half"}), "expected a number, got 'half'"),
    "flag for a number": (_recipe(parameters={"density": True}), "expected a number, got True"),
    "null": (_recipe(parameters={"density": None}), "expected a number, got None"),
    "not finite": (_recipe(parameters={"lambda": float("nan")}), "finite"),
    "above": (_recipe(parameters={"density": 1.5}), "at most 1"),
    "below": (_recipe(parameters={"density": [0.5, -0.1]}), "at least 0"),
    "not positive": (_recipe("consensus_ta", parameters={"tall_mask_lambda": 0}), "more than 0"),
    "not whole": (_recipe("consensus_ta", parameters={"consensus_k": 1.5}), "whole number"),
    "number for a flag": (_recipe(parameters={"normalize": 2}), "true or false"),
    "choice": (_recipe(parameters={"scope": "modle"}), "expected one of tensor, row, model.*did you mean 'model'"),
    "gradient of a choice": (_recipe(parameters={"scope": ["row", "tensor"]}), "not a gradient"),
    "filtered choice": (_recipe(parameters={"scope": [{"filter": "a", "value": "row"}]}), "not filters"),
    "no base": (_recipe(base_model=...), "'base_model' is missing"),
    "no models": (_recipe(models=...), "'models' is missing"),
    "empty models": (_recipe(models=[]), "models"),
    "model without name": (_recipe(models=[{"parameters": {}}]), r"models\[0\].model' is missing"),
    "model not text": (_recipe(models=[{"model": 3}]), r"models\[0\].model.*got 3"),
    "dtype": (_recipe(dtype="bfloat61"), "dtype: expected one of float32.*did you mean 'bfloat16'"),
    "integer dtype": (_recipe(out_dtype="int64"), "out_dtype: expected one of"),
    "seed": (_recipe(seed=-1), "seed"),
    "slices": (_recipe(slices=[]), "'slices' is not supported"),
    "tokenizer": (_recipe(tokenizer_source="union"), "vocabularies are not changed"),
    "template": (_recipe(chat_template="auto"), "'chat_template' is not supported"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refuses_wrong_recipes(case: str) -> None:
    recipe, message = WRONG[case]
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: ties\nmerge_method: slerp\n", "given twice"),
        ("a: [", "not valid YAML"),
        ("- a\n", "expected a mapping"),
        ("", "expected a mapping"),
        ("a: !!python/object/apply:os.system [id]\n", "tag .*os.system' is not supported"),
    ],
)
def test_refuses_bad_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_refuses_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "absent.yml")
    (tmp_path / "latin.yml").write_bytes(b"\xff")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "latin.yml")


@pytest.mark.parametrize("name", METHODS)
def test_templates_are_recipes(tmp_path: Path, name: str) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(recipe_template(METHODS[name]))
    recipe = load_recipe(path)
    assert recipe.method is METHODS[name]
    written = {*recipe.settings, *(key for model in recipe.models for key in model.settings)}
    assert written == {parameter.name for parameter in METHODS[name].parameters if not parameter.inert}

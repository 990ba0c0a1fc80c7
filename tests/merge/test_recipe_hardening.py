"""Recipes that are hostile, ambiguous or damaged: a clear RecipeError that names the place, at once."""

from __future__ import annotations

import datetime
import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from toy_checkpoints import recipe_of, save_model

from taskloom.merge.errors import MergeError, RecipeError
from taskloom.merge.parameters import Rule
from taskloom.merge.recipe import load_recipe
from taskloom.merge.recipe_source import MOST_BYTES
from taskloom.merge.run import merge_checkpoints

_HEAD = "merge_method: ties\nbase_model: base\nmodels:\n  - model: a\n    parameters:\n      weight: 0.5\n"


def _written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "recipe.yml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def _with_weight(value: Any) -> dict[str, Any]:
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in ("a", "b")]
    return {"merge_method": "ties", "base_model": "base", "models": [*models, {"model": "c", "parameters": {"weight": value}}]}


def _laughs(levels: int, opening: str, closing: str) -> str:
    lines = [f"l0: &l0 {opening}x: 1{closing}" if opening == "{" else "l0: &l0 [x]"]
    for level in range(1, levels):
        inner = ", ".join(f"k{number}: *l{level - 1}" if opening == "{" else f"*l{level - 1}" for number in range(10))
        lines.append(f"l{level}: &l{level} {opening}{inner}{closing}")
    return "\n".join(lines) + "\n"


_MERGE_KEYS = "m0: &m0 {a: 1, b: 2}\n" + "".join(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}\n" for n in range(1, 12))

BAD_YAML: dict[str, tuple[str | bytes, str]] = {
    "bomb of lists": (_laughs(12, "[", "]"), "holds more than 500000 values once its aliases are written out"),
    "bomb of mappings": (_laughs(12, "{", "}"), "holds more than 500000 values once its aliases are written out"),
    "bomb of merge keys": (_MERGE_KEYS, "holds more than 500000 values"),
    "bomb of long texts": ("a: &a '" + "x" * 1_000_000 + "'\nb: [" + "*a, " * 60 + "]\n", "holds more than 500000 values once its aliases"),
    "many values": ("a: [" + "1," * 600_000 + "]\n", "holds more than 500000 values"),
    "alias inside itself": (_HEAD + "parameters: &p\n  density: [*p]\n", "alias 'p' stands inside what it stands for"),
    "alias of nothing": (_HEAD + "seed: *s\n", "undefined alias"),
    "merge key of text": (_HEAD + "parameters:\n  <<: text\n", "is not valid YAML"),
    "python object": (
        "a: !!python/object/apply:os.system [id]\n",
        "line 1, column 4: tag 'tag:yaml.org,2002:python/object/",
    ),
    "python tuple": ("a: !!python/tuple [1]\n", "is not supported"),
    "own tag": (_HEAD + "seed: !secret 1\n", "line 7, column 7: tag '!secret' is not supported"),
    "binary tag": (_HEAD + "dtype: !!binary ZmxvYXQxNg==\n", "binary' is not supported"),
    "set tag": (_HEAD + "parameters: !!set {density}\n", "set' is not supported"),
    "timestamp tag": (_HEAD + "seed: !!timestamp 2024-01-01\n", "timestamp' is not supported"),
    "nested lists": (_HEAD + "seed: " + "[" * 100 + "]" * 100, "is nested more than 64 deep"),
    "nested 100000 deep": ("[" * 100_000, "exceeded maximum nesting depth"),
    "nested mappings": ("{a: " * 80 + "1" + "}" * 80, "is nested more than 64 deep"),
    "key twice": (_HEAD + "merge_method: slerp\n", "line 7, column 1: key 'merge_method' is given twice"),
    "key twice under a model": ("models:\n  - model: a\n    model: b\n", "line 3, column 5: key 'model' is given twice"),
    "key twice, once in quotes": ("a: 1\n'a': 2\n", "key 'a' is given twice"),
    "list as a key": ("? [a]\n: 1\n", "a key must be text, not a list, a mapping or an alias"),
    "mapping as a key": ("{a: 1}: 2\n", "a key must be text"),
    "two documents": (_HEAD + "---\n" + _HEAD, "is not valid YAML"),
    "octal": (_HEAD + "seed: 0777\n", "line 7, column 7: 0777 is octal in YAML 1.1"),
    "base 60": (_HEAD + "seed: 1:30\n", "1:30 is a number to base 60"),
    "whole number of 400 digits": (_HEAD + "seed: " + "9" * 400 + "\n", "seed: a whole number of 1329 bits"),
    "whole number of 5000 digits": (_HEAD + "seed: " + "9" * 5000 + "\n", "a whole number of more than 400 digits"),
    "whole number of 100000 digits in base 16": (_HEAD + "seed: 0x" + "f" * 100_000 + "\n", "seed: a whole number of 400000 bits"),
    "not UTF-8": (b"merge_method: \xff\xfe\n", "is not UTF-8 text"),
    "UTF-16": (_HEAD.encode("utf-16"), "is not UTF-8 text"),
    "binary": (b"\x7fELF\x02\x01\x01\0\0\0\0", "is not valid YAML"),
    "pickle": (b"\x80\x04\x95\x10", "is not UTF-8 text"),
    "NUL": (_HEAD + "seed: \0\n", "is not valid YAML"),
    "tab": ("models:\n\t- model: a\n", "is not valid YAML"),
    "lone surrogate": (_HEAD + 'dtype: "\\ud800"\n', "invalid Unicode character"),
    "only a comment": ("# nothing\n", "expected a mapping with merge_method and models, got NoneType"),
    "text": ("ties", "expected a mapping with merge_method and models, got str"),
    "JSON cut short": ('{"merge_method": "ties", "models": [', "is not valid YAML"),
}


@pytest.mark.parametrize("case", BAD_YAML)
def test_refuses_hostile_yaml_at_once(tmp_path: Path, case: str) -> None:
    text, message = BAD_YAML[case]
    path = _written(tmp_path, text)
    start = time.monotonic()
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert time.monotonic() - start < 10


def test_names_the_file_that_is_no_yaml(tmp_path: Path) -> None:
    path = _written(tmp_path, "a: [")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


def test_aliases_and_merge_keys_are_read(tmp_path: Path) -> None:
    text = "merge_method: ties\nbase_model: base\nmodels:\n- model: a\n  parameters: &p {weight: 0.5, density: 0.2}\n"
    recipe = load_recipe(_written(tmp_path, text + "- {model: b, parameters: *p}\n- model: c\n  parameters: {<<: *p, density: 0.3}\n"))
    assert recipe.models[1].settings == recipe.models[0].settings
    assert recipe.models[2].settings == {"weight": (Rule(None, (0.5,)),), "density": (Rule(None, (0.3,)),)}


def test_dates_are_text(tmp_path: Path) -> None:
    recipe = load_recipe(_written(tmp_path, _HEAD.replace("model: a", "model: 2024-01-01")))
    assert recipe.models[0].label == "2024-01-01"


def test_refuses_a_huge_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yml"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(RecipeError, match=f"recipe.yml: is above the limit of {MOST_BYTES} bytes"):
        load_recipe(path)


def _loop() -> list[Any]:
    loop: list[Any] = [1.0]
    loop.append(loop)
    return loop


_MANY: list[Any] = [[0.5] * 1000] * 1000

WRONG_VALUES: dict[str, tuple[Any, str]] = {
    "flag": (True, "models[2].parameters.weight: expected a number, got True"),
    "text": ("half", "models[2].parameters.weight: expected a number, got 'half'"),
    "empty text": ("", "models[2].parameters.weight: expected a number, got ''"),
    "long text": ("9" * 100_000 + "x", "models[2].parameters.weight: expected a number, got '9999"),
    "null": (None, "models[2].parameters.weight: expected a number, got None"),
    "NaN": (float("nan"), "models[2].parameters.weight: expected a finite number, got nan"),
    "infinity": (float("-inf"), "models[2].parameters.weight: expected a finite number, got -inf"),
    "infinity as text": ("inf", "models[2].parameters.weight: expected a finite number, got inf"),
    "number of 400 digits": (10**400, "models[2].parameters.weight: a whole number of 1329 bits"),
    "text of 400 digits": ("1" + "0" * 400, "models[2].parameters.weight: expected a finite number"),
    "date": (datetime.date(2024, 1, 1), "models[2].parameters.weight: expected text, a number, true, false or null, got datetime.date"),
    "set": ({0.5}, "models[2].parameters.weight: expected text, a number, true, false or null, got {0.5} of type set"),
    "bytes": (b"0.5", "models[2].parameters.weight: expected text, a number, true, false or null, got b'0.5' of type bytes"),
    "complex": (1j, "models[2].parameters.weight: expected text, a number, true, false or null, got 1j of type complex"),
    "generator": (iter([0.5]), "models[2].parameters.weight: expected text, a number"),
    "gradient": ([0.5, True], "models[2].parameters.weight[1]: expected a number, got True"),
    "gradient of gradients": ([0.5, [0.5]], "models[2].parameters.weight[1]: expected a number, got [0.5]"),
    "empty gradient": ([], "models[2].parameters.weight: an empty list is no gradient"),
    "filter": ([{"filter": "mlp", "value": "x"}], "models[2].parameters.weight[0].value: expected a number, got 'x'"),
    "gradient in a filter": (
        [{"value": 1}, {"filter": "mlp", "value": [1, float("nan")]}],
        "models[2].parameters.weight[1].value[1]: expected a finite number, got nan",
    ),
    "filter that is a number": ([{"filter": 7, "value": 1}], "models[2].parameters.weight[0].filter: expected text, got 7"),
    "filter that is a flag": (
        [{"filter": False, "value": 1}],
        "models[2].parameters.weight[0].filter: expected text, got False; write",
    ),
    "filter that is a list": ([{"filter": ["a"], "value": 1}], "models[2].parameters.weight[0].filter: expected text, got ['a']"),
    "list that holds itself": (_loop(), "is nested more than 64 deep, or holds itself"),
    "values beyond count": (_MANY, "holds more than 500000 values"),
    "large array": (np.zeros(1_000_000), "models[2].parameters.weight: an array of 8000000 bytes"),
    "array of objects": (np.array([object()]), "models[2].parameters.weight[0]: expected text, a number"),
}


@pytest.mark.parametrize("case", WRONG_VALUES)
def test_says_where_a_value_is_wrong(case: str) -> None:
    value, message = WRONG_VALUES[case]
    with pytest.raises(RecipeError) as caught:
        load_recipe(_with_weight(value))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_mapping_that_holds_itself() -> None:
    recipe = _with_weight(0.5)
    recipe["parameters"] = recipe
    with pytest.raises(RecipeError, match=r"parameters\.parameters\.parameters: is nested more than 64 deep, or holds itself"):
        load_recipe(recipe)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("density", -0.1, "parameters.density: expected at least 0, got -0.1"),
        ("density", 1.1, "parameters.density: expected at most 1, got 1.1"),
        ("density", "-1e-3", "parameters.density: expected at least 0, got -0.001"),
        ("normalize", "maybe", "parameters.normalize: expected true or false, got 'maybe'"),
        ("normalize", 0.5, "parameters.normalize: expected true or false, got 0.5"),
        ("scope", "", "parameters.scope: expected one of tensor, row, model, got ''"),
        ("scope", True, "parameters.scope: expected one of tensor, row, model, got True"),
        ("", 1, "parameters: ties has no parameter ''"),
        ("x" * 100_000, 1, "parameters: ties has no parameter 'xxx"),
    ],
)
def test_refuses_values_out_of_range(name: str, value: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(_with_weight(0.5) | {"parameters": {name: value}})
    assert message in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("merge_method", "", "merge_method '' is unknown"),
        ("merge_method", 5, "merge_method: input should be a valid string, got 5"),
        ("merge_method", True, "write it in quotes"),
        ("base_model", "", "base_model: string should have at least 1 character"),
        ("base_model", False, "base_model: input should be a valid string, got False; YAML takes on, off, yes and no"),
        ("models", "a", "models: input should be a valid list, got 'a'"),
        ("models", {"a": 1}, "models: input should be a valid list"),
        ("models", [None], "models[0]: input should be a valid dictionary, got None"),
        ("models", ["a"], "models[0]: input should be a valid dictionary, got 'a'"),
        ("models", [{"model": ""}], "models[0].model: string should have at least 1 character"),
        ("models", [{"model": "a", "parameters": [1]}], "models[0].parameters: input should be a valid dictionary"),
        ("parameters", {1: 2}, "parameters: a key must be text, got 1"),
        ("seed", True, "seed: input should be a valid integer, got True"),
        ("seed", 1.0, "seed: input should be a valid integer, got 1.0"),
        ("seed", 2**64, "seed: input should be less than 18446744073709551616"),
        ("dtype", "", "dtype: expected one of float32, float16, bfloat16, float64, got ''"),
        ("dtype", 16, "dtype: input should be a valid string, got 16"),
        (7, 7, "unknown key 7"),
        ("y" * 100_000, 7, "unknown key 'yyy"),
    ],
)
def test_refuses_wrong_keys_and_types(key: Any, value: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(_with_weight(0.5) | {key: value})
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 0.001), ("1.0e-3", 0.001), ("'0.5'", 0.5), ("1_000", 1000.0), ("-.5", -0.5), ("+1", 1.0)]
)
def test_spellings_of_numbers(tmp_path: Path, text: str, value: float) -> None:
    recipe = load_recipe(_written(tmp_path, _HEAD.replace("0.5", text)))
    assert recipe.models[0].settings["weight"] == (Rule(None, (value,)),)


@pytest.mark.parametrize(
    ("method", "changes", "where"),
    [
        ("task_arithmetic", {"weight": 1e39}, "models[0].parameters.weight: 1e+39"),
        ("task_arithmetic", {"weight": [0, -1e39]}, "models[0].parameters.weight: -"),
        ("ties", {"weight": [{"filter": "q_proj", "value": 1e300}, {"value": 1}]}, "models[0].parameters.weight[0].value: 1e+300"),
        ("task_arithmetic", {"parameters": {"lambda": 1e39}}, "parameters.lambda: 1e+39"),
        ("consensus_ta", {"parameters": {"tall_mask_lambda": 1e39}}, "parameters.tall_mask_lambda: 1e+39"),
        (
            "task_arithmetic",
            {"weight": 3e38},
            "models[1].parameters.weight: the weights for tensor '",
        ),
    ],
)
def test_refuses_numbers_that_float32_cannot_hold(
    tmp_path: Path, models: dict[str, Path], method: str, changes: dict[str, Any], where: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        merge_checkpoints(recipe_of(models, method, **changes), tmp_path / "out")
    assert str(caught.value).startswith(where)
    assert "does not fit float32, in which it is merged: at most 3.40282e+38" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_float64_holds_larger_numbers(tmp_path: Path) -> None:
    zero, one = {"w": np.zeros(3)}, {"w": np.ones(3)}
    base, tuned = save_model(tmp_path / "base", zero), save_model(tmp_path / "tuned", one)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(tuned), "parameters": {"weight": 1e200}}],
    }
    merge_checkpoints(recipe, tmp_path / "out")
    np.testing.assert_array_equal(load_file(tmp_path / "out" / "model.safetensors")["w"], np.full(3, 1e200))


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    """Room for some 40 more open files, where a terminal gives 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(len(os.listdir("/proc/self/fd")) + 40, hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _merge_many(tmp_path: Path, count: int) -> None:
    base = save_model(tmp_path / "base", {"w": np.zeros(5, np.float32)})
    folders = [save_model(tmp_path / f"m{number}", {"w": np.full(5, number, np.float32)}) for number in range(count)]
    tuned = [{"model": str(folder), "parameters": {"weight": 2**-10}} for folder in folders]
    report = merge_checkpoints({"merge_method": "task_arithmetic", "base_model": str(base), "models": tuned}, tmp_path / "out")
    assert len(report.models) == count
    # Multiples of 2^-10 below 2^24 are added without rounding.
    expected = np.full(5, sum(range(count)) * 2**-10, np.float32)
    np.testing.assert_array_equal(load_file(tmp_path / "out" / "model.safetensors")["w"], expected)


@pytest.mark.usefixtures("few_descriptors")
def test_merges_more_models_than_descriptors(tmp_path: Path) -> None:
    _merge_many(tmp_path, 120)


@pytest.mark.slow
@pytest.mark.usefixtures("few_descriptors")
def test_merges_a_thousand_models(tmp_path: Path) -> None:
    _merge_many(tmp_path, 1000)


def test_thousands_of_filters(tmp_path: Path, models: dict[str, Path]) -> None:
    filters = [{"filter": f"layers.{number}.nothing", "value": 9} for number in range(3_000)]
    start = time.monotonic()
    merge_checkpoints(recipe_of(models, weight=[*filters, {"value": 0.5}]), tmp_path / "many")
    assert time.monotonic() - start < 20
    merge_checkpoints(recipe_of(models, weight=0.5), tmp_path / "one")
    many, one = (tmp_path / name / "model.safetensors" for name in ("many", "one"))
    assert many.read_bytes() == one.read_bytes()


def test_a_recipe_through_a_pipe(tmp_path: Path, models: dict[str, Path]) -> None:
    text = _HEAD.replace("model: a", f"model: {models['a']}").replace("base_model: base", f"base_model: {models['base']}")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(text,))
    writer.start()
    merge_checkpoints(pipe, tmp_path / "out")
    writer.join()
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_refuses_a_folder_or_a_damaged_path_for_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match=r"cannot be read: .*null"):
        load_recipe("a\0b")
    with pytest.raises(RecipeError, match="cannot be read: File name too long"):
        load_recipe("a" * 5000)


@pytest.mark.parametrize(
    "label", ["a\0b", "a" * 300, "org/" + "a" * 250, "a" * 250 + "/" + "b" * 250, "org/name@" + "a" * 240 + "/" + "b" * 300]
)
def test_refuses_model_names_that_are_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: str) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MergeError, match=r"^model '"):
        merge_checkpoints(_with_weight(0.5) | {"base_model": label}, tmp_path / "out")


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "~nobody-has-this-name/out"])
def test_refuses_outputs_that_are_no_paths(tmp_path: Path, models: dict[str, Path], name: str) -> None:
    out = name if name.startswith("~") else tmp_path / name
    with pytest.raises(MergeError, match=r"^output "):
        merge_checkpoints(recipe_of(models), out)


def test_refuses_an_output_that_is_a_loop(tmp_path: Path, models: dict[str, Path]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(MergeError, match=r"^output "):
        merge_checkpoints(recipe_of(models), tmp_path / "loop")

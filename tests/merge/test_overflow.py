"""Finite inputs whose merge does not fit the output's dtype are refused, not written as infinity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from toy_checkpoints import save_model

from taskloom.merge import MergeError, merge_checkpoints, merge_state_dicts


def _recipe(folder: Path, method: str, scale: float, out_dtype: str | None) -> dict[str, Any]:
    """A merge of tensors of which one entry, of many, becomes ``scale``."""
    base = np.zeros((1025, 1027), np.float32)
    tuned = base.copy()
    tuned[-1, -1] = scale
    for name, tensor in (("base", base), ("a", tuned)):
        save_model(folder / name, {"small": np.ones(3, np.float32), "w": tensor})
    recipe: dict[str, Any] = {"merge_method": method, "models": [{"model": str(folder / "a")}], "out_dtype": out_dtype}
    if method != "passthrough":
        recipe |= {"base_model": str(folder / "base"), "parameters": {"t": 1.0} if method == "slerp" else {"weight": 1.0}}
    if method == "linear":
        recipe["parameters"]["normalize"] = False
    return recipe


@pytest.mark.parametrize("method", ["task_arithmetic", "linear", "slerp", "passthrough"])
def test_a_value_too_large_for_the_output_is_an_error(tmp_path: Path, method: str) -> None:
    recipe = _recipe(tmp_path, method, 65520.0, "float16")
    with pytest.raises(MergeError, match=r"tensor 'w': a value is too large for float16; choose a wider out_dtype"):
        merge_checkpoints(recipe, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    merge_checkpoints(recipe, tmp_path / "out", allow_nonfinite=True)
    assert np.isinf(load_file(tmp_path / "out" / "model.safetensors")["w"][-1, -1])
    merge_checkpoints(recipe | {"out_dtype": "bfloat16"}, tmp_path / "wide")
    merge_checkpoints(_recipe(tmp_path / "fits", method, 65504.0, "float16"), tmp_path / "fits" / "out")


def test_a_sum_too_large_for_float32_is_an_error(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, "task_arithmetic", 3e38, None)
    recipe["parameters"]["weight"] = 2.0
    with pytest.raises(MergeError, match=r"tensor 'w': a value is too large for float32"):
        merge_checkpoints(recipe, tmp_path / "out")


def test_infinities_that_are_only_converted_stay(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, "passthrough", np.inf, "float16")
    merge_checkpoints(recipe, tmp_path / "out")
    assert np.isinf(load_file(tmp_path / "out" / "model.safetensors")["w"][-1, -1])


@pytest.mark.parametrize("size", [1, 1 << 20, (1 << 20) + 1])
def test_in_memory(size: int) -> None:
    base = {"w": torch.zeros(size)}
    tuned = {"w": torch.zeros(size)}
    tuned["w"][-1] = 1e5
    with pytest.raises(MergeError, match="a value is too large for float16"):
        merge_state_dicts(base, [tuned], "task_arithmetic", weight=1.0, out_dtype="float16")
    merged = merge_state_dicts(base, [tuned], "task_arithmetic", weight=1.0, out_dtype="float16", allow_nonfinite=True)
    assert merged["w"][-1].isinf()

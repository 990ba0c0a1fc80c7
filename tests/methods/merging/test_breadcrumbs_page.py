"""The page of Model Breadcrumbs: its code and its recipe run and agree, its figures are those of the shipped result."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml
from breadcrumbs_models import assert_same_bits
from safetensors.torch import load_file, save_file

from taskloom.merge import merge_checkpoints
from taskloom.methods.merging.breadcrumbs import merge_breadcrumbs

PAGE = Path(__file__).parents[3] / "docs" / "methods" / "breadcrumbs.md"
SHAPES = {"layers.0.attn.weight": (24, 16), "layers.0.mlp.weight": (40, 16), "norm.weight": (16,)}


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_code_and_recipe_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "math", "code"):
        (tmp_path / name).mkdir()
        state = {key: torch.randn(shape, generator=generator).bfloat16() for key, shape in SHAPES.items()}
        save_file(state, tmp_path / name / "model.safetensors")
    scope: dict[str, Any] = {}
    (code,), (recipe,) = _blocks("python"), _blocks("yaml")
    exec(compile(code, str(PAGE), "exec"), scope)
    base, tuned = scope["base"], scope["tuned"]
    plain = load_file("merged.safetensors")
    assert_same_bits({name: plain[name] for name in base}, merge_breadcrumbs(base, tuned))
    assert not scope["merged"]["layers.0.attn.weight"].equal(plain["layers.0.attn.weight"])
    merge_checkpoints(yaml.safe_load(recipe), tmp_path / "out")
    by_recipe = load_file(tmp_path / "out" / "model.safetensors")
    assert_same_bits({name: by_recipe[name] for name in plain}, plain)


def test_figures_of_the_page() -> None:
    result = json.loads(files("taskloom").joinpath("methods", "merging", "breadcrumbs", "result.json").read_text(encoding="utf-8"))
    values = {arm: numbers for claim in result["claims"] for arm, numbers in claim["values"].items()}
    rows = [line.strip("|").split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    shown = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows}
    for row, arms in {
        "tensor, weight 1": ("gamma 0.01, tensor, weight 1", "gamma 0, tensor, weight 1"),
        "tensor, weight 0.5": ("gamma 0.01, tensor, weight 0.5", "gamma 0, tensor, weight 0.5"),
        "row, weight 1": ("gamma 0.01, row, weight 1", "gamma 0, row, weight 1"),
        **{
            name: (f"breadcrumbs, tuned on {name}", f"task arithmetic, tuned on {name}")
            for name in (
                "the first 3 tasks",
                "the first 4 tasks",
                "any 3 successive tasks",
                "any 4 successive tasks",
                "all 8 tasks",
            )
        },
    }.items():
        assert shown[row] == [f"{fmean(values[arm]):.3f}" for arm in arms], row

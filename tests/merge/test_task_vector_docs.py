"""docs/task_vectors.md: its example runs, and does what its comments say."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toy_checkpoints import save_model, toy_tensors

import taskloom
from taskloom import TaskVector

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "task_vectors.md").read_text(encoding="utf-8")


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "math", "code")):
        save_model(tmp_path / name, toy_tensors(seed), {"tie_word_embeddings": False})
    torch.manual_seed(0)
    base_model = nn.Linear(5, 3)
    tuned_model = copy.deepcopy(base_model)
    with torch.no_grad():
        tuned_model.weight += 1
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {"base_model": base_model, "tuned_model": tuned_model}
    exec(code, names)

    cosine, norm = map(float, capsys.readouterr().out.split())
    base, math, coded = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "math", "code"))
    assert norm == TaskVector(base, math).norm()
    assert cosine == TaskVector(base, math).cosine(TaskVector(base, coded))
    merged, forgot = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "forgot"))
    for name in TaskVector(base, math):
        torch.testing.assert_close(merged[name], base[name] + 0.7 * (math[name] - base[name]) + 0.4 * (coded[name] - base[name]))
        torch.testing.assert_close(forgot[name], base[name] - 0.5 * (math[name] - base[name]))
    torch.testing.assert_close(names["model"].weight, base_model.weight + 0.8)
    assert torch.equal(names["again"]["weight"], names["tau"]["weight"])


def test_every_public_name_is_on_the_page() -> None:
    for name in dir(TaskVector):
        if not name.startswith("_") and name not in ("get", "keys", "values"):
            assert re.search(rf"\b{name}\b", PAGE), name
    assert "merge_task_vectors" in taskloom.merge.__all__


def test_the_page_is_linked() -> None:
    for page in ("README.md", "docs/merge.md"):
        assert "task_vectors.md" in (ROOT / page).read_text(encoding="utf-8")

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from toy_checkpoints import copying_executor, save_model, toy_tensors


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """``taskloom.merge.execute`` with an executor that copies."""
    module = types.ModuleType("taskloom.merge.execute")
    module.execute_plan = copying_executor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "taskloom.merge.execute", module)
    return module


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """A base and two tunings of it."""
    seeds = {"base": 0, "a": 1, "b": 2}
    config = {"model_type": "toy", "tie_word_embeddings": False, "torch_dtype": "float32"}
    return {name: save_model(tmp_path / name, toy_tensors(seed), config) for name, seed in seeds.items()}

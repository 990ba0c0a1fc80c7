from __future__ import annotations

from pathlib import Path

import pytest
from toy_checkpoints import save_model, toy_tensors


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """A base and two tunings of it."""
    seeds = {"base": 0, "a": 1, "b": 2}
    config = {"model_type": "toy", "tie_word_embeddings": False, "torch_dtype": "float32"}
    return {name: save_model(tmp_path / name, toy_tensors(seed), config) for name, seed in seeds.items()}

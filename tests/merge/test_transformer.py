"""A real transformer through the merge: all-MiniLM-L6-v2, perturbed copies of it, and the result loaded with transformers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from minilm_package import packaged_minilm
from taskloom.merge import merge_checkpoints

pytestmark = pytest.mark.slow

SENTENCE = "A merged model still has to know what a sentence means."
_COPIES = ("a", "b", "c")
_NOISE = 0.02


def _perturbed(base: dict[str, Any], seed: int) -> dict[str, Any]:
    """Every float tensor with normal noise of 2 % of its own standard deviation."""
    random = np.random.default_rng(seed)
    return {
        name: value + np.float32(_NOISE * value.std()) * random.standard_normal(value.shape, dtype=np.float32)
        if value.dtype == np.float32
        else value
        for name, value in base.items()
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` as the package ships it, and three copies with the base's configuration and perturbed weights."""
    packaged = packaged_minilm()
    folder = tmp_path_factory.mktemp("minilm")
    shutil.copytree(packaged, folder / "base")
    base = load_file(folder / "base" / "model.safetensors")
    for seed, name in enumerate(_COPIES):
        (folder / name).mkdir()
        shutil.copy(packaged / "config.json", folder / name)
        save_file(_perturbed(base, seed), folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder


def _merge(models: Path, out: Path, method: str, own: dict[str, Any], shared: dict[str, Any], **options: Any) -> dict[str, Any]:
    chosen = _COPIES[:1] if method == "slerp" else _COPIES
    recipe = {
        "merge_method": method,
        "base_model": str(models / "base"),
        "models": [{"model": str(models / name), "parameters": own} for name in chosen],
        "parameters": shared,
        "seed": 7,
    }
    merge_checkpoints(recipe, out, **options)
    return dict(load_file(out / "model.safetensors")) if (out / "model.safetensors").exists() else {}


def _embed(folder: Path) -> tuple[Any, np.ndarray[Any, Any]]:
    """The model as transformers loads it, and its mean-pooled embedding of the sentence."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)(SENTENCE, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    return model, hidden.mean(1)[0].numpy()


METHODS = [
    ("ties", {"weight": 1.0, "density": 0.3}, {}),
    ("dare_ties", {"weight": 0.4, "density": 0.5}, {}),
    ("breadcrumbs", {"weight": 0.4, "density": 0.8, "gamma": 0.01}, {}),
    ("consensus_ta", {"weight": 1.0}, {"lambda": 0.4}),
    ("slerp", {}, {"t": 0.5}),
]


@pytest.mark.parametrize(("method", "own", "shared"), METHODS, ids=[method for method, _, _ in METHODS])
def test_a_merged_transformer_loads_and_still_embeds(
    models: Path, tmp_path: Path, method: str, own: dict[str, Any], shared: dict[str, Any]
) -> None:
    base = load_file(models / "base" / "model.safetensors")
    merged = _merge(models, tmp_path / "out", method, own, shared)
    assert {name: (value.dtype, value.shape) for name, value in merged.items()} == {
        name: (value.dtype, value.shape) for name, value in base.items()
    }
    model, embedding = _embed(tmp_path / "out")
    loaded = model.state_dict()
    for name, value in merged.items():
        if name in loaded:
            assert loaded[name].numpy().tobytes() == value.tobytes(), name
    missing = [name for name in loaded if name not in merged and "position_ids" not in name]
    assert missing == []
    _, expected = _embed(models / "base")
    assert np.isfinite(embedding).all()
    assert not np.array_equal(embedding, expected)
    cosine = embedding @ expected / (np.linalg.norm(embedding) * np.linalg.norm(expected))
    assert cosine > 0.99


def test_shards_and_an_index_load_the_same(models: Path, tmp_path: Path) -> None:
    _merge(models, tmp_path / "one", "ties", {"weight": 1.0, "density": 0.3}, {})
    assert not _merge(models, tmp_path / "many", "ties", {"weight": 1.0, "density": 0.3}, {}, shard_size="60MB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    np.testing.assert_array_equal(_embed(tmp_path / "one")[1], _embed(tmp_path / "many")[1])

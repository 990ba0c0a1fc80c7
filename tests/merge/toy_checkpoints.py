"""Small checkpoints on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Tensors = Mapping[str, np.ndarray]


def toy_tensors(seed: int = 0, layers: int = 3, width: int = 8) -> dict[str, np.ndarray]:
    """A decoder in miniature, float32, with an embedding, a head, norms, and one integer buffer."""
    generator = np.random.default_rng(seed)
    tensors = {"model.embed_tokens.weight": generator.normal(size=(16, width)), "model.norm.weight": generator.normal(size=width)}
    for layer in range(layers):
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = generator.normal(size=(width, width))
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = generator.normal(size=(2 * width, width))
    tensors["lm_head.weight"] = generator.normal(size=(16, width))
    floats = {name: value.astype(np.float32) for name, value in tensors.items()}
    return floats | {"model.position_ids": np.arange(16, dtype=np.int64)}


def save_model(
    folder: Path, tensors: Tensors | None = None, config: Mapping[str, Any] | None = None, file: str = "model.safetensors"
) -> Path:
    """A model folder with one safetensors file and a config.json (``config={}`` writes an empty one, None writes none)."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors if tensors is not None else toy_tensors()), folder / file)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_sharded(folder: Path, shards: Mapping[str, Tensors]) -> Path:
    """A model folder with several files and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for file, tensors in shards.items():
        save_file(dict(tensors), folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def recipe_of(folders: Mapping[str, Path], method: str = "task_arithmetic", weight: Any = 0.5, **changes: Any) -> dict[str, Any]:
    """A recipe that merges the models ``a`` and ``b`` of ``folders`` into ``base``."""
    own = {} if weight is None else {"weight": weight}
    recipe: dict[str, Any] = {
        "merge_method": method,
        "base_model": str(folders["base"]),
        "models": [{"model": str(folders[name]), "parameters": dict(own)} for name in ("a", "b")],
    }
    return recipe | changes

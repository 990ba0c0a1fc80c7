"""Fine-tunings of one small base on disk, and the archive's arithmetic in plain numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]


def base_state(dtype: torch.dtype = torch.float32, seed: int = 0) -> State:
    """Odd sizes, a scalar, an empty tensor, names with dots and slashes, and one integer buffer."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (13, 5), "model.layers.0.w/q.weight": (7, 3), "norm": (9,), "scale": (), "none": (0, 4)}
    state = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return state | {"position_ids": torch.arange(6)}


def tuned_state(base: Mapping[str, torch.Tensor], seed: int, dtype: torch.dtype | None = None, share: float = 1.0) -> State:
    """The base, moved by noise in a share of its entries, in the base's dtype or another."""
    generator = torch.Generator().manual_seed(1000 + seed)
    tuned = {}
    for name, values in base.items():
        if not values.is_floating_point():
            tuned[name] = values.clone()
            continue
        noise = 0.1 * torch.randn(values.shape, generator=generator) * (torch.rand(values.shape, generator=generator) < share)
        tuned[name] = (values.float() + noise).to(dtype or values.dtype)
    return tuned


def save_state(folder: Path, state: Mapping[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: values.contiguous() for name, values in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "toy", "tie_word_embeddings": false, "torch_dtype": "float32"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def save_models(folder: Path, base: State, tuned: Sequence[State]) -> dict[str, Path]:
    """``base`` and ``task-0``, ``task-1`` ... as model folders."""
    models = {"base": save_state(folder / "base", base)}
    return models | {f"task-{number}": save_state(folder / f"task-{number}", state) for number, state in enumerate(tuned)}


def archive_recipe(models: Mapping[str, Path], thresholds: Sequence[float] | None = None, **parameters: Any) -> dict[str, Any]:
    """A recipe for all models but the base."""
    names = [name for name in models if name != "base"]
    entries: list[dict[str, Any]] = [{"model": str(models[name])} for name in names]
    for entry, threshold in zip(entries, thresholds or [], strict=False):
        entry["parameters"] = {"tall_mask_lambda": threshold}
    return {"merge_method": "tall_masks", "base_model": str(models["base"]), "models": entries, "parameters": parameters}


def load_model(folder: Path) -> State:
    state: State = load_file(folder / "model.safetensors")
    return state


def as_float(values: torch.Tensor) -> np.ndarray:
    """float64 stays, everything else becomes float32."""
    wide = values.dtype == torch.float64
    array: np.ndarray = values.to(torch.float64 if wide else torch.float32).numpy()
    return array


def numpy_sum_vector(base: np.ndarray, tuned: Sequence[np.ndarray]) -> np.ndarray:
    """Sum of the differences in the order of the tasks, each step rounded."""
    total = np.zeros_like(base)
    for values in tuned:
        total = total + (values - base)
    return total


def numpy_mask(base: np.ndarray, tuned: np.ndarray, vector: np.ndarray, threshold: float) -> np.ndarray:
    """The packed TALL mask of one tensor."""
    delta = tuned - base
    bits = np.abs(delta) > base.dtype.type(threshold) * np.abs(vector - delta)
    return np.packbits(bits.reshape(-1), bitorder="little")


def numpy_ties_vector(base: Mapping[str, np.ndarray], tuned: Sequence[Mapping[str, np.ndarray]], density: float) -> dict[str, np.ndarray]:
    """TIES with a sum in place of its mean, over the whole model: equal magnitudes rank by index, tensors sorted by name."""
    names = sorted(base)
    flat = [np.concatenate([(state[name] - base[name]).reshape(-1) for name in names]) for state in tuned]
    trimmed = []
    for delta in flat:
        kept = np.argsort(-np.abs(delta), kind="stable")[: max(1, int(density * delta.size))]
        trimmed.append(np.where(np.isin(np.arange(delta.size), kept), delta, 0).astype(delta.dtype))
    votes = np.zeros_like(flat[0])
    for values in trimmed:
        votes = votes + values
    signs = np.sign(votes)
    signs[signs == 0] = -1 if signs.sum() < 0 else 1
    merged = np.zeros_like(votes)
    for values in trimmed:
        merged = merged + np.where(np.sign(values) == signs, values, 0).astype(values.dtype)
    split = np.split(merged, np.cumsum([base[name].size for name in names])[:-1])
    return {name: part.reshape(base[name].shape) for name, part in zip(names, split, strict=True)}

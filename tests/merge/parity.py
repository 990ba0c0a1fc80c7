"""One recipe given to taskloom and to mergekit: checkpoints that both accept, the two programs, and what the inputs allow as a result."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from taskloom.merge import merge_checkpoints
from taskloom.merge.header import read_header, write_header

Tensors = dict[str, np.ndarray]

HIDDEN, INTERMEDIATE, VOCABULARY, LAYERS = 64, 160, 512, 4

_EPSILON32 = 2.0**-24

PEERS = Path(os.environ.get("TASKLOOM_PEERS", Path(__file__).resolve().parents[2] / ".venv-peers"))


def llama_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor that transformers expects in a small Llama."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes |= {f"{prefix}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """Float32 values rounded to bfloat16, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def from_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bf16_ulp(values: np.ndarray) -> np.ndarray:
    """The distance of neighbouring bfloat16 numbers at each value."""
    return np.exp2(np.floor(np.log2(np.maximum(np.abs(values), 2.0**-126))) - 7)


def save_llama(folder: Path, tensors: Tensors, dtype: str) -> Path:
    """A model folder that transformers reads as a Llama; ``dtype`` is BF16 or F32."""
    folder.mkdir(parents=True)
    header, offsets, size = write_header([(name, dtype, values.shape) for name, values in tensors.items()])
    content = np.zeros(size, np.uint8)
    content[: len(header)] = np.frombuffer(header, np.uint8)
    for values, offset in zip(tensors.values(), offsets, strict=True):
        data = (bf16_bits(values) if dtype == "BF16" else values.astype(np.float32)).ravel().view(np.uint8)
        content[offset : offset + data.size] = data
    content.tofile(folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read_llama(folder: Path) -> Tensors:
    """Every tensor of a model folder as float32."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = np.fromfile(path, np.uint8)
        for name, entry in read_header(path).items():
            raw = content[entry.offset : entry.offset + entry.nbytes].copy()
            tensors[name] = (from_bits(raw.view(np.uint16)) if entry.dtype == "BF16" else raw.view(np.float32)).reshape(entry.shape)
    return tensors


def make_models(folder: Path, dtype: str, seed: int) -> dict[str, Path]:
    """A base and three tunings of it."""
    random = np.random.default_rng(seed)
    base = {}
    for name, shape in llama_shapes().items():
        values = 0.02 * random.standard_normal(shape) + (1 if name.endswith("norm.weight") else 0)
        base[name] = from_bits(bf16_bits(values)) if dtype == "BF16" else values.astype(np.float32)
    models = {"base": save_llama(folder / "base", base, dtype)}
    for label in "abc":
        tuned = {name: values + np.float32(0.001) * random.standard_normal(values.shape, np.float32) for name, values in base.items()}
        models[label] = save_llama(folder / label, tuned, dtype)
    return models


def merge_with_peer(recipe: Mapping[str, Any], folder: Path) -> Tensors:
    """What mergekit's command makes of a recipe."""
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    command = [PEERS / "bin" / "mergekit-yaml", path, folder / "peer", "--quiet", "--no-copy-tokenizer", "--random-seed", "7"]
    answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=300, check=False)
    assert answer.returncode == 0, answer.stderr
    return read_llama(folder / "peer")


def merge_with_both(recipe: Mapping[str, Any], folder: Path) -> tuple[Tensors, Tensors]:
    """Ours and the peer's result of one recipe."""
    merge_checkpoints(recipe, folder / "ours", seed=7)
    ours, peer = read_llama(folder / "ours"), merge_with_peer(recipe, folder)
    assert ours.keys() == peer.keys() == llama_shapes().keys()
    return ours, peer


@dataclass(frozen=True)
class Selection:
    """Which entries of a delta are kept whatever the order of equal magnitudes, and which may be kept or not by that order."""

    certain: np.ndarray
    open: np.ndarray


def select_ranks(delta: np.ndarray, begin: int, end: int) -> Selection:
    """The entries of descending magnitude ranks ``begin <= rank < end``, leaving the order of ties at both cuts open."""
    magnitudes = np.abs(delta).ravel()
    descending = np.sort(magnitudes)[::-1]
    first = magnitudes.size - np.searchsorted(descending[::-1], magnitudes, side="right")
    last = magnitudes.size - np.searchsorted(descending[::-1], magnitudes, side="left") - 1
    certain = (first >= begin) & (last < end)
    possible = (last >= begin) & (first < end)
    return Selection(certain.reshape(delta.shape), (possible & ~certain).reshape(delta.shape))


@dataclass(frozen=True)
class Outcome:
    """One way in which a tensor's entries may come out, with the entries that it is open to."""

    values: np.ndarray
    allowed: np.ndarray


@dataclass(frozen=True)
class Contest:
    """Where a magnitude is tied at a cut, and where an election's sum is within rounding of zero."""

    tied: np.ndarray
    near_zero: np.ndarray


def _rounding(parts: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Most that float32 sums of the parts, in any order, can be off."""
    return 2 * len(parts) * _EPSILON32 * sum(np.abs(part) for part in parts)


def _combine(parts: np.ndarray, weights: np.ndarray, sign: np.ndarray | None, normalize: bool) -> np.ndarray:
    counted = np.ones(parts.shape, bool) if sign is None else parts * sign > 0
    total = np.where(counted, parts, 0).sum(axis=0)
    if not normalize:
        return total
    divisor = (weights * counted).sum(axis=0)
    return total / np.where(divisor == 0, 1, divisor)


def outcomes(
    base: np.ndarray, deltas: Sequence[np.ndarray], selections: Sequence[Selection], weights: Sequence[float], elect: bool, normalize: bool
) -> list[Outcome]:
    """Every result that the inputs allow: any order of ties at a cut, either sign where an election's sum is within rounding of zero.

    Computed in float64 from float32 deltas and weights.
    """
    factors = np.array(weights, np.float32).astype(np.float64).reshape(-1, *(1,) * base.ndim)
    found = []
    for choice in product((False, True), repeat=len(deltas)):
        allowed = np.logical_and.reduce([selection.open | (not kept) for selection, kept in zip(selections, choice, strict=True)])
        kept_masks = [selection.certain | (selection.open & kept) for selection, kept in zip(selections, choice, strict=True)]
        parts = factors * np.where(np.stack(kept_masks), np.stack(deltas).astype(np.float64), 0)
        if not elect:
            found.append(Outcome(base + _combine(parts, factors, None, normalize), allowed))
            continue
        total = parts.sum(axis=0)
        near_zero = np.abs(total) <= _rounding(parts)
        for sign in (1.0, -1.0):
            signed = np.where(near_zero, sign, np.where(total >= 0, 1.0, -1.0))
            fits = allowed & (near_zero | (sign > 0))
            found.append(Outcome(base + _combine(parts, factors, signed, normalize), fits))
    return found


def is_contested(deltas: Sequence[np.ndarray], selections: Sequence[Selection], weights: Sequence[float], elect: bool) -> Contest:
    """Why the inputs leave an entry's result open."""
    tied = np.logical_or.reduce([selection.open for selection in selections])
    factors = np.array(weights, np.float32).astype(np.float64)
    parts = [factor * np.where(kept.certain, delta, 0) for factor, kept, delta in zip(factors, selections, deltas, strict=True)]
    near_zero = np.abs(sum(parts)) <= _rounding(parts) if elect else np.zeros(tied.shape, bool)
    return Contest(tied, near_zero & (sum(np.abs(part) for part in parts) > 0))


def matches(got: np.ndarray, outcome: Outcome, slack: np.ndarray) -> np.ndarray:
    """Where bfloat16 results are an outcome rounded, give or take float32 arithmetic (``slack``)."""
    return outcome.allowed & (np.abs(got - outcome.values) <= bf16_ulp(outcome.values + slack) / 2 + slack)

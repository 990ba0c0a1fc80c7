"""Makes seeded checkpoints to measure merges with: a base and tunings of it, under the tensor names of a Llama."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from taskloom.merge.shards import Layout, PlannedTensor, lay_out

_BLOCK = 1 << 20
_ELEMENT_BYTES = {"BF16": 2, "F32": 4}
_INITIAL_SPREAD = 0.02
_TUNING_SPREAD = 0.001

# Widths by the parameters that a model has at least: (parameters, hidden size, intermediate size, vocabulary).
_WIDTHS = ((800_000_000, 4096, 11008, 32000), (60_000_000, 1024, 2816, 32000), (8_000_000, 256, 704, 8000), (0, 64, 176, 1000))

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class LlamaSize:
    """What decides a Llama's tensors: hidden size, size of the MLP, layers, vocabulary."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int

    @property
    def layer_parameters(self) -> int:
        return 4 * self.hidden**2 + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def parameters(self) -> int:
        return 2 * self.vocabulary * self.hidden + self.hidden + self.layers * self.layer_parameters


def llama_of(parameters: int) -> LlamaSize:
    """The size with about so many parameters, at least one layer."""
    hidden, intermediate, vocabulary = next(widths for least, *widths in _WIDTHS if parameters >= least)
    one = LlamaSize(hidden, intermediate, 1, vocabulary)
    return LlamaSize(hidden, intermediate, 1 + max(0, round((parameters - one.parameters) / one.layer_parameters)), vocabulary)


def llama_shapes(size: LlamaSize) -> Shapes:
    """Every tensor of a Llama with its shape."""
    wide, narrow = (size.intermediate, size.hidden), (size.hidden, size.intermediate)
    shapes: Shapes = {"model.embed_tokens.weight": (size.vocabulary, size.hidden)}
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (size.hidden, size.hidden) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.gate_proj.weight": wide, f"{prefix}mlp.up_proj.weight": wide, f"{prefix}mlp.down_proj.weight": narrow}
        shapes |= {f"{prefix}{name}_layernorm.weight": (size.hidden,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (size.hidden,), "lm_head.weight": (size.vocabulary, size.hidden)}


def llama_config(size: LlamaSize, dtype: str) -> dict[str, object]:
    """config.json as transformers reads it, with heads of 64 (16 in tiny models)."""
    heads = size.hidden // (64 if size.hidden >= 256 else 16)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": {"BF16": "bfloat16", "F32": "float32"}[dtype],
    }


def to_bf16(values: np.ndarray) -> np.ndarray:
    """The bits of float32 values rounded to the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32 values."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _blocks(name: str, numel: int, tunings: int, generator: np.random.Generator) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Offsets and float32 values of one tensor, of the base and of each tuning."""
    for begin in range(0, numel, _BLOCK):
        count = min(_BLOCK, numel - begin)
        base = generator.standard_normal(count, np.float32) * np.float32(_INITIAL_SPREAD)
        if name.endswith("norm.weight"):
            base += np.float32(1)
        # A tuning starts from the stored base, not from the values before their rounding.
        stored = from_bf16(to_bf16(base))
        yield begin, [stored] + [stored + generator.standard_normal(count, np.float32) * np.float32(_TUNING_SPREAD) for _ in range(tunings)]


def _open_outputs(folder: Path, layout: Layout, stack: ExitStack) -> list[BinaryIO]:
    files = []
    for output in layout.files:
        file = stack.enter_context((folder / output.name).open("wb"))
        file.write(output.header)
        file.truncate(output.size)
        files.append(file)
    return files


def _write_side_files(folder: Path, size: LlamaSize, dtype: str, layout: Layout) -> None:
    (folder / "config.json").write_text(json.dumps(llama_config(size, dtype), indent=2))
    if layout.weight_map:
        index = {"metadata": {"total_size": layout.total_size}, "weight_map": layout.weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_checkpoints(
    folder: Path, size: LlamaSize, *, tunings: int = 3, dtype: str = "BF16", seed: int = 0, shard_bytes: int = 1 << 62
) -> list[Path]:
    """Write a base and its tunings block by block, in a few megabytes of memory; returns their folders, the base's first.

    Parameters
    ----------
    folder
        Where the model folders ``base``, ``tuned-1`` and so on are made.
    size
        Of every model.
    tunings
        Models besides the base.
    dtype
        safetensors code: BF16 or F32.
    seed
        Of all values.
    shard_bytes
        Most bytes of tensors in one file.
    """
    shapes = llama_shapes(size)
    layout = lay_out([PlannedTensor(name, dtype, shape) for name, shape in shapes.items()], shard_bytes)
    folders = [folder / "base", *(folder / f"tuned-{number + 1}" for number in range(tunings))]
    generator = np.random.default_rng(seed)
    with ExitStack() as stack:
        models = []
        for path in folders:
            path.mkdir(parents=True)
            _write_side_files(path, size, dtype, layout)
            models.append(_open_outputs(path, layout, stack))
        for name, shape in shapes.items():
            target = layout.targets[name]
            for begin, values in _blocks(name, prod(shape), tunings, generator):
                for files, block in zip(models, values, strict=True):
                    files[target.file].seek(target.offset + begin * _ELEMENT_BYTES[dtype])
                    files[target.file].write(to_bf16(block).data if dtype == "BF16" else block.data)
    return folders


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every BF16 or F32 tensor of a model folder as float32; for small models only."""
    from taskloom.merge.header import read_header

    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = np.memmap(path, np.uint8, "r")
        for name, entry in read_header(path).items():
            raw = np.array(data[entry.offset : entry.offset + entry.nbytes])
            values = from_bf16(raw.view(np.uint16)) if entry.dtype == "BF16" else raw.view(np.float32)
            tensors[name] = values.reshape(entry.shape)
    return tensors

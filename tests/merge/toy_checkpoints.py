"""Small checkpoints on disk, and a stand-in for the executor, for tests of the Python side of a merge."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from taskloom.merge.header import tensor_bytes
from taskloom.merge.plan import MergePlan, TensorJob, TensorSource

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


@dataclass
class FakeTensorStats:
    name: str
    numel: int
    kept: list[int]
    conflicts: int
    dots: list[list[float]]
    seconds: float
    magnitude_histogram: list[list[int]] | None


@dataclass
class FakeResult:
    tensors: list[FakeTensorStats]
    seconds: float
    bytes_read: int
    bytes_written: int


def _read(plan: MergePlan, job: TensorJob, source: TensorSource) -> np.ndarray:
    data = np.memmap(plan.inputs[source.file], np.uint8, "r")[source.offset : source.offset + tensor_bytes(source.dtype, job.shape)]
    raw = np.array(data)
    if source.dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view({"F32": np.float32, "F16": np.float16, "F64": np.float64}.get(source.dtype, np.uint8))


def _encode(values: np.ndarray, source: str, target: str) -> bytes:
    if source == target and target != "BF16":
        return values.tobytes()
    if target == "BF16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype({"F32": np.float32, "F16": np.float16, "F64": np.float64}[target]).tobytes()


def copying_executor(
    plan: MergePlan,
    folder: Path,
    *,
    threads: int = 0,
    magnitude_histogram: bool = False,
    progress: Callable[[int], None] | None = None,
) -> FakeResult:
    """Write every planned file with the base's values (the first model's where there is no base); statistics are of no merge."""
    for file in plan.outputs:
        with (folder / file.name).open("wb") as out:
            out.write(file.header)
            out.truncate(file.size)
    stats = []
    tasks = len(plan.models)
    for done, job in enumerate(plan.jobs):
        source = job.base or job.tuned[0]
        with (folder / plan.outputs[job.target.file].name).open("r+b") as out:
            out.seek(job.target.offset)
            out.write(_encode(_read(plan, job, source), source.dtype, job.target.dtype))
        numel = int(np.prod(job.shape))
        if job.stages is not None:
            dots = [[4.0 if row == column else 1.0 for column in range(tasks)] for row in range(tasks)]
            histogram = (
                [[numel if exponent == 120 else 0 for exponent in range(256)] for _ in range(tasks)] if magnitude_histogram else None
            )
            stats.append(FakeTensorStats(job.name, numel, [numel // 2] * tasks, numel // 4, dots, 0.001, histogram))
        if progress:
            progress(done)
    return FakeResult(stats, 0.5, 1000, sum(file.size for file in plan.outputs))

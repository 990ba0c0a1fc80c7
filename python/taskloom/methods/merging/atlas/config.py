"""aTLAS with the look of a PEFT method: a configuration that is applied to a model, and adapters in files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from taskloom.merge.task_vector import TaskVector
from taskloom.methods.merging.atlas.blocks import shown
from taskloom.methods.merging.atlas.coefficients import Granularity, check_same
from taskloom.methods.merging.atlas.lowrank import LowRankTaskVector
from taskloom.methods.merging.atlas.lowrank_model import LowRankAtlasModel
from taskloom.methods.merging.atlas.model import AtlasModel
from taskloom.nn.adapter_files import write_adapter

# A vector, or where one is: a file of TaskVector.save, or the folder of a PEFT LoRA adapter.
Source = Mapping[str, Tensor] | LowRankTaskVector | str | PathLike[str]
Read = Mapping[str, Tensor] | LowRankTaskVector
_KIND = "ATLAS"
# float16 vectors have the norms of float32 ones within this.
_SAME_NORM = 1e-3


def _is_path(source: Source) -> TypeGuard[str | PathLike[str]]:
    return isinstance(source, (str, PathLike))


def _read(source: Source) -> Read:
    if not _is_path(source):
        assert isinstance(source, Mapping)
        return source
    path = Path(source)
    return LowRankTaskVector.from_peft(path) if path.is_dir() else TaskVector.load(path)


def _read_all(sources: Mapping[str, Source] | Sequence[Source]) -> dict[str, Read]:
    if isinstance(sources, (str, PathLike)):
        raise TypeError("task_vectors: expected a sequence of task vectors or of paths, or a mapping from an id to each, got one path")
    if isinstance(sources, Mapping):
        return {key: _read(source) for key, source in sources.items()}
    found: dict[str, Read] = {}
    for place, source in enumerate(sources):
        key = fspath(source) if _is_path(source) else f"task-{place}"
        if key in found:
            raise ValueError(f"task_vectors: {key} is there twice")
        found[key] = _read(source)
    return found


@dataclass(frozen=True, kw_only=True)
class AtlasConfig:
    """Task vectors, and how their coefficients are laid out.

    Attributes
    ----------
    task_vectors
        In a sequence or by id: :class:`taskloom.TaskVector` or other mappings from parameter names to tensors, or
        :class:`LowRankTaskVector`; or paths, of files that ``TaskVector.save`` wrote or folders of PEFT LoRA adapters. An id is a mapping's
        key, a path as it is given, or ``task-0``, ``task-1``, ...
    granularity, partitions, partition_seed, matrices_only, target_modules, linearized
        As of :class:`AtlasModel`; with LoRA vectors only ``granularity`` and ``target_modules``.
    """

    task_vectors: Mapping[str, Source] | Sequence[Source]
    granularity: Granularity = "block"
    partitions: int = 1
    partition_seed: int = 0
    matrices_only: bool = False
    target_modules: str | Sequence[str] | None = None
    linearized: bool = False

    def apply(self, model: nn.Module) -> AtlasModel | LowRankAtlasModel:
        """The adapter of a model: a :class:`LowRankAtlasModel` for LoRA vectors, else an :class:`AtlasModel`.

        Raises
        ------
        TypeError, ValueError
            As of these classes; or LoRA vectors come together with others, or with settings that they cannot have.
        """
        vectors = _read_all(self.task_vectors)
        lowrank = {key: one for key, one in vectors.items() if isinstance(one, LowRankTaskVector)}
        if not lowrank:
            dense = {key: one for key, one in vectors.items() if not isinstance(one, LowRankTaskVector)}
            return AtlasModel(
                model,
                dense,
                granularity=self.granularity,
                partitions=self.partitions,
                partition_seed=self.partition_seed,
                matrices_only=self.matrices_only,
                target_modules=self.target_modules,
                linearized=self.linearized,
            )
        if len(lowrank) < len(vectors):
            raise ValueError("task_vectors: expected LoRA vectors or dense ones, got both; dense() makes one of the other")
        if self.partitions != 1 or self.linearized:
            raise ValueError("task_vectors: LoRA vectors take partitions=1 and linearized=False; use dense() vectors for these")
        return LowRankAtlasModel(model, lowrank, granularity=self.granularity, target_modules=self.target_modules)


def save_atlas(adapter: AtlasModel | LowRankAtlasModel, folder: str | PathLike[str]) -> None:
    """Write an adapter: its coefficients, and the ids of the vectors and names of the blocks that they belong to.

    Parameters
    ----------
    adapter
        Of either class. Of the base nothing is written, of each vector a norm, by which :func:`load_atlas` knows it again.
    folder
        Made where it is missing: ``adapter_model.safetensors`` and ``adapter_config.json``; each takes its name only when it is whole.

    Raises
    ------
    RuntimeError
        If the adapter gave its layers back (``unload`` or ``merge_`` of LoRA vectors).
    """
    prints = adapter.fingerprints()
    meant = adapter.target_modules
    targets = meant if meant is None or isinstance(meant, str) else list(meant)
    config = {"peft_type": _KIND, **adapter.belongs_to(), "target_modules": targets, "norms": prints}
    if isinstance(adapter, AtlasModel):
        config |= {"matrices_only": adapter.matrices_only}
    write_adapter({"coef": adapter.coef.detach()}, config, folder)


def load_atlas(
    folder: str | PathLike[str], model: nn.Module, task_vectors: Mapping[str, Source] | Sequence[Source] | None = None
) -> AtlasModel | LowRankAtlasModel:
    """Read an adapter that :func:`save_atlas` wrote.

    Parameters
    ----------
    folder
        With ``adapter_model.safetensors`` and ``adapter_config.json``.
    model
        The base that the adapter was trained on, or a copy.
    task_vectors
        The vectors that it was trained with, as of :class:`AtlasConfig`: by the ids that it has (more of them may be there), or in its
        order. Default None: its ids are paths.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    TypeError
        If the folder holds another kind of adapter.
    ValueError
        If a vector is missing or another one than the adapter's, or the model has other blocks.
    """
    from safetensors.torch import load_file

    source = Path(folder)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        if not (source / name).is_file():
            raise FileNotFoundError(f"{source}: expected an aTLAS adapter, {name} is missing")
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("peft_type") != _KIND:
        raise TypeError(f"{source}: expected an adapter of the type {_KIND}, got {config.get('peft_type')}")
    coef = load_file(source / "adapter_model.safetensors")["coef"]
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    absent = [name for name in config["blocks"] if name not in parameters]
    if absent:
        raise ValueError(f"{source}: {type(model).__name__} lacks {shown(absent)}, to which coefficients belong")
    adapter = _described(config, _chosen(config["task_vectors"], task_vectors)).apply(model)
    check_same(adapter.belongs_to(), config, str(source))
    if adapter.coef.shape != coef.shape:
        raise ValueError(f"{source}: coef: expected shape {tuple(adapter.coef.shape)}, got {tuple(coef.shape)}")
    for key, expected, found in zip(adapter.vector_ids, config["norms"], adapter.fingerprints(), strict=True):
        if not math.isclose(expected, found, rel_tol=_SAME_NORM):
            raise ValueError(f"{source}: task vector {key!r}: expected the one of norm {expected:.6g}, got one of norm {found:.6g}")
    with torch.no_grad():
        adapter.coef.copy_(coef)
    return adapter


def _chosen(ids: Sequence[str], given: Mapping[str, Source] | Sequence[Source] | None) -> dict[str, Source]:
    """The sources of an adapter's vectors, by its ids and in its order."""
    if given is None:
        return {key: key for key in ids}
    if not isinstance(given, Mapping):
        if len(given) != len(ids):
            raise ValueError(f"task_vectors: expected {len(ids)} as the adapter has, got {len(given)}")
        return dict(zip(ids, given, strict=True))
    absent = [key for key in ids if key not in given]
    if absent:
        raise ValueError(f"task_vectors: expected {', '.join(map(repr, ids))}, {', '.join(map(repr, absent))} is missing")
    return {key: given[key] for key in ids}


def _described(config: Mapping[str, Any], vectors: Mapping[str, Source]) -> AtlasConfig:
    """The configuration of an adapter's file."""
    return AtlasConfig(
        task_vectors=vectors,
        granularity=config["granularity"],
        partitions=config.get("partitions", 1),
        partition_seed=config.get("partition_seed", 0),
        matrices_only=config.get("matrices_only", False),
        target_modules=config["target_modules"],
        linearized=config.get("linearized", False),
    )

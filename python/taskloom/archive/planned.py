"""Plans an archive from a recipe and the headers of its models, without reading a weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from taskloom.archive.format import STEM, ArchivedTask, ArchiveInfo, base_name, mask_bytes, mask_name, vector_name
from taskloom.archive.recipe import Compression, compression_of, load_compress_recipe
from taskloom.merge.align import AlignedTensor, align
from taskloom.merge.checkpoint import Checkpoint
from taskloom.merge.errors import CheckpointError, RecipeError
from taskloom.merge.header import FLOATING, TensorEntry, tensor_bytes
from taskloom.merge.planner import Cast, open_models
from taskloom.merge.recipe import Recipe
from taskloom.merge.report import taskloom_version
from taskloom.merge.shards import Layout, PlannedTensor, lay_out, parse_size


@dataclass(frozen=True)
class SharedTensor:
    """A tensor with masks: its entry in the base and in every task, and whether its arithmetic is float64."""

    name: str
    base: TensorEntry
    tuned: tuple[TensorEntry, ...]

    @property
    def wide(self) -> bool:
        return any(entry.dtype == "F64" for entry in (self.base, *self.tuned))

    @property
    def vector_dtype(self) -> str:
        return "F64" if self.wide else "F32"

    @property
    def bytes_in(self) -> int:
        return sum(entry.nbytes for entry in (self.base, *self.tuned))


@dataclass(frozen=True)
class PlannedArchive:
    """An archive before it is made.

    Attributes
    ----------
    recipe, cast, compression
        What to do, the opened models, and the settings.
    shared
        Tensors with masks, sorted by name: the order in which equal magnitudes rank in a trim.
    copied
        The base's other tensors.
    layout
        Files, and the place of every tensor by its name in the archive.
    info
        The archive's metadata.
    notes
        For the report.
    """

    recipe: Recipe
    cast: Cast
    compression: Compression
    shared: tuple[SharedTensor, ...]
    copied: tuple[AlignedTensor, ...]
    layout: Layout
    info: ArchiveInfo
    notes: tuple[str, ...]

    @property
    def bytes_in(self) -> int:
        """Bytes of input tensors, each counted once."""
        return sum(tensor.bytes_in for tensor in self.shared) + sum(tensor.reference.nbytes for tensor in self.copied)

    @property
    def progress_total(self) -> int:
        """Bytes that the streaming passes read and write together; a trim reads the models four times more."""
        passes = 4 if self.compression.vector == "ties" else 0
        return self.bytes_in + self.layout.total_size + passes * sum(tensor.bytes_in for tensor in self.shared)


def model_bytes(model: Checkpoint) -> int:
    """Bytes of a model's safetensors files."""
    return sum(identity.size for identity in model.files)


def _refuse_wide_mixture(shared: Sequence[SharedTensor]) -> None:
    first = shared[0]
    for tensor in shared:
        if tensor.wide != first.wide:
            raise RecipeError(
                f"vector: ties cannot rank float64 tensors together with others: {first.name!r} and {tensor.name!r}; use vector: sum"
            )


def _refuse_other_buffers(cast: Cast) -> list[str]:
    """What the base's copy cannot stand for is refused by its header already; returns notes on buffers that a task lacks."""
    notes = []
    for model in cast.tasks:
        for name, entry in model.tensors.items():
            known = cast.reference.tensors.get(name)
            if known is None:
                if entry.dtype not in FLOATING:
                    raise CheckpointError(
                        f"model {model.label!r}: the base has no tensor {name!r} ({entry.dtype}), so it cannot be restored"
                    )
            elif (known.dtype in FLOATING) != (entry.dtype in FLOATING) or (
                known.dtype not in FLOATING and (known.dtype, known.shape) != (entry.dtype, entry.shape)
            ):
                raise CheckpointError(
                    f"model {model.label!r}: tensor {name!r} is {known.dtype} {list(known.shape)} in the base and {entry.dtype} "
                    f"{list(entry.shape)} here, so it cannot be restored"
                )
        lacking = [name for name, entry in cast.reference.tensors.items() if entry.dtype not in FLOATING and name not in model.tensors]
        notes += [f"{model.label} has no {name}; it is restored with the base's" for name in lacking]
    return notes


def _info(recipe: Recipe, cast: Cast, compression: Compression, shared: Sequence[SharedTensor]) -> ArchiveInfo:
    tasks = []
    for number, (name, threshold) in enumerate(zip(compression.tasks, compression.thresholds, strict=True)):
        own = {tensor.name: tensor.tuned[number].dtype for tensor in shared if tensor.tuned[number].dtype != tensor.base.dtype}
        tasks.append(ArchivedTask(name, cast.settings[number].label, threshold, own))
    return ArchiveInfo(
        tasks=tuple(tasks),
        vector=compression.vector,
        density=compression.density,
        tensors=len(shared),
        parameters=sum(tensor.base.numel for tensor in shared),
        base_model=cast.reference.label,
        recipe=recipe.text,
        taskloom=taskloom_version(),
    )


def archive_tensors(base: Iterable[PlannedTensor], shared: Sequence[PlannedTensor], tasks: Sequence[str]) -> list[PlannedTensor]:
    """Base, vector, then one task after the other, so that the shards of another task are not needed to restore one.

    Parameters
    ----------
    base
        The base's tensors by their own names.
    shared
        The vector's, which are those with masks, sorted by name.
    tasks
        The tasks' names.
    """
    planned = [PlannedTensor(base_name(tensor.name), tensor.dtype, tensor.shape) for tensor in base]
    planned += [PlannedTensor(vector_name(tensor.name), tensor.dtype, tensor.shape) for tensor in shared]
    for task in tasks:
        planned += [PlannedTensor(mask_name(task, tensor.name), "U8", (mask_bytes(prod(tensor.shape)),)) for tensor in shared]
    return planned


def plan_archive(source: str | Path | Mapping[str, Any], *, shard_size: str | int = "5GB") -> PlannedArchive:
    """Read a recipe and its models' headers and plan the archive, writing nothing.

    Parameters
    ----------
    source
        Path of a YAML recipe, or the same content as a mapping.
    shard_size
        Most bytes of tensors in one file.

    Raises
    ------
    RecipeError
        If the recipe is not what it should be.
    CheckpointError
        If the models do not fit each other, or a task has a tensor that the archive could not restore.
    """
    limit = parse_size(shard_size)
    recipe = load_compress_recipe(source)
    cast = open_models(recipe)
    compression = compression_of(recipe, cast)
    notes = _refuse_other_buffers(cast)
    alignment = align(cast.reference, cast.tasks)
    shared = tuple(
        sorted(
            (SharedTensor(tensor.name, tensor.reference, tensor.members) for tensor in alignment.tensors if tensor.members is not None),
            key=lambda tensor: tensor.name,
        )
    )
    if compression.vector == "ties":
        _refuse_wide_mixture(shared)
    info = _info(recipe, cast, compression, shared)
    whole = [PlannedTensor(name, entry.dtype, entry.shape) for name, entry in cast.reference.tensors.items()]
    vector = [PlannedTensor(tensor.name, tensor.vector_dtype, tensor.base.shape) for tensor in shared]
    layout = lay_out(archive_tensors(whole, vector, compression.tasks), limit, stem=STEM, metadata=info.to_metadata())
    return PlannedArchive(
        recipe=recipe,
        cast=cast,
        compression=compression,
        shared=shared,
        copied=tuple(tensor for tensor in alignment.tensors if tensor.members is None),
        layout=layout,
        info=info,
        notes=(*recipe.notes, *alignment.notes, *notes),
    )


def bytes_by_part(planned: PlannedArchive) -> dict[str, int]:
    """Bytes of the archive's tensors: ``base``, ``vector``, and ``masks`` of all tasks."""
    base = sum(entry.nbytes for entry in planned.cast.reference.tensors.values())
    vector = sum(tensor_bytes(tensor.vector_dtype, tensor.base.shape) for tensor in planned.shared)
    return {"base": base, "vector": vector, "masks": planned.layout.total_size - base - vector}

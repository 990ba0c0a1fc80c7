"""Makes the whole plan of a merge from a recipe and the headers of its models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from taskloom._selection import name_key
from taskloom.merge.align import AlignedTensor, Alignment, align, some
from taskloom.merge.checkpoint import Checkpoint, open_checkpoint
from taskloom.merge.errors import RecipeError
from taskloom.merge.float_range import check_range
from taskloom.merge.header import TensorEntry
from taskloom.merge.locate import locate
from taskloom.merge.parameters import Position, layer_positions, resolve
from taskloom.merge.plan import MergePlan, Stages, TensorJob, TensorSource, TensorTarget
from taskloom.merge.recipe import ModelInput, Recipe
from taskloom.merge.resolve import Task, check_uniform_selection, segment_length, tensor_stages
from taskloom.merge.shards import PlannedTensor, lay_out


@dataclass(frozen=True)
class Cast:
    """The models of a merge by their part in it.

    ``reference`` decides the output's tensors and gives its other files; ``tasks`` are the models that are merged, each with its
    settings. With ``deltas`` the tasks are taken as differences from the reference.
    """

    reference: Checkpoint
    tasks: tuple[Checkpoint, ...]
    settings: tuple[Task, ...]
    deltas: bool

    @property
    def models(self) -> tuple[Checkpoint, ...]:
        """Every model once, the reference first."""
        return (self.reference, *(task for task in self.tasks if task is not self.reference))


@dataclass(frozen=True)
class PlannedMerge:
    """A plan with the models it reads, and the notes that belong into its report."""

    plan: MergePlan
    cast: Cast
    notes: tuple[str, ...]

    def check_inputs(self) -> None:
        """Look at every input file again; raises CheckpointError where one has changed since it was opened."""
        for model in self.cast.models:
            for identity in model.files:
                identity.check_unchanged()

    @property
    def bytes_in(self) -> int:
        """Bytes of tensors that the merge reads."""
        return sum(source_bytes(job, source) for job in self.plan.jobs for source in (job.base, *job.tuned) if source is not None)

    @property
    def progress_total(self) -> int:
        """What the number of bytes done reaches at the end: tensor bytes read and written."""
        return self.bytes_in + self.plan.total_size


def source_bytes(job: TensorJob, source: TensorSource) -> int:
    """Bytes of one input tensor of a job."""
    return PlannedTensor(job.name, source.dtype, job.shape).nbytes


def _check_count(recipe: Recipe, tasks: Sequence[ModelInput]) -> None:
    if not tasks:
        raise RecipeError(f"recipe: models lists only the base {recipe.base_model!r}; there is nothing to merge")
    most = recipe.method.max_models
    if most is not None and len(tasks) > most:
        besides = " besides base_model" if recipe.method.base == "required" else ""
        raise RecipeError(f"recipe: {recipe.method.name} takes {most} model{besides}, got {len(tasks)}")


def open_models(recipe: Recipe) -> Cast:
    """Find and open every model of a recipe and give each its part.

    A base that is also listed under ``models`` is not a task, except in ``linear``, where the base is one of the averaged models
    (and is added when it is not listed), as in mergekit.

    Raises
    ------
    RecipeError
        If a model is listed twice or the method takes another number of models.
    CheckpointError
        If a model cannot be found or read.
    """
    opened: dict[Path, Checkpoint] = {}

    def open_once(label: str) -> Checkpoint:
        located = locate(label, recipe.folder)
        path = located.path.resolve()
        if path not in opened:
            opened[path] = open_checkpoint(located)
        return opened[path]

    base = open_once(recipe.base_model) if recipe.base_model is not None else None
    listed = [(entry, open_once(entry.label)) for entry in recipe.models]
    for number, (entry, checkpoint) in enumerate(listed):
        if any(checkpoint is other for _, other in listed[:number]):
            raise RecipeError(f"recipe: models[{number}]: {entry.label!r} is listed twice")
    return cast_models(recipe, base, listed)


def cast_models(recipe: Recipe, base: Checkpoint | None, listed: Sequence[tuple[ModelInput, Checkpoint]]) -> Cast:
    """Give each opened model its part, by the rules of :func:`open_models`.

    Raises
    ------
    RecipeError
        If the method takes another number of models.
    """
    inputs = list(listed)
    if recipe.method.base == "required":
        inputs = [(entry, checkpoint) for entry, checkpoint in listed if checkpoint is not base]
    elif base is not None and all(checkpoint is not base for _, checkpoint in listed):
        inputs = [*listed, (ModelInput(recipe.base_model or "", {}), base)]
    _check_count(recipe, [entry for entry, _ in inputs])
    return Cast(
        reference=base or inputs[0][1],
        tasks=tuple(checkpoint for _, checkpoint in inputs),
        settings=tuple(Task(entry.label, entry.settings) for entry, _ in inputs),
        deltas=recipe.method.base == "required",
    )


def _in_float64(cast: Cast, tensor: AlignedTensor) -> bool:
    """Whether the executor computes a merged tensor in float64 rather than float32."""
    inputs = (*(tensor.members or ()), *((tensor.reference,) if cast.deltas else ()))
    return any(entry.dtype == "F64" for entry in inputs)


def _stages(recipe: Recipe, cast: Cast, alignment: Alignment, positions: Mapping[str, Position]) -> dict[str, Stages | None]:
    """The stages of every merged tensor (None: copied, but by the method's choice)."""
    merged = [tensor for tensor in alignment.tensors if tensor.members is not None]
    check_range(recipe, cast.settings, [tensor.setting_name for tensor in merged if not _in_float64(cast, tensor)], positions)
    model_numel = sum(tensor.reference.numel for tensor in merged)
    found = {
        tensor.name: tensor_stages(
            recipe.method,
            recipe.settings,
            cast.settings,
            tensor.setting_name,
            tensor.reference.shape,
            positions[tensor.setting_name],
            model_numel,
        )
        for tensor in merged
    }
    of_model = {name: stages for name, stages in found.items() if stages is not None}
    if any(stages.scope == "model" for stages in of_model.values()):
        check_uniform_selection(of_model, cast.settings)
    return found


def output_code(recipe: Recipe, tensor: AlignedTensor) -> str:
    """The safetensors dtype of one tensor of the output."""
    return tensor.reference.dtype if tensor.members is None else recipe.output_dtype or tensor.reference.dtype


def _job(
    tensor: AlignedTensor,
    stages: Stages | None,
    deltas: bool,
    source: Callable[[TensorEntry], TensorSource],
    place: TensorTarget,
    layer: int | None,
) -> TensorJob:
    shape, key = tensor.reference.shape, name_key(tensor.setting_name)
    if tensor.members is None or stages is None:
        return TensorJob(tensor.name, shape, place, source(tensor.reference), key=key, layer=layer)
    base = source(tensor.reference) if deltas else None
    return TensorJob(tensor.name, shape, place, base, tuple(source(entry) for entry in tensor.members), stages, key, layer)


def plan_jobs(
    recipe: Recipe, cast: Cast, alignment: Alignment, targets: Mapping[str, TensorTarget]
) -> tuple[list[TensorJob], tuple[Path, ...]]:
    """One job per aligned tensor, in the reference's order, with every tensor's stages; and the files that the jobs read.

    Parameters
    ----------
    recipe, cast, alignment
        What to do, with which models, and their tensors matched by name.
    targets
        Where each tensor of the output goes.

    Raises
    ------
    RecipeError
        If a parameter has no value for some tensor, or values do not go together.
    """
    positions = layer_positions(cast.reference.tensors)
    stages = _stages(recipe, cast, alignment, positions)
    files: dict[Path, int] = {}

    def source(entry: TensorEntry) -> TensorSource:
        return TensorSource(files.setdefault(entry.file, len(files)), entry.offset, entry.dtype)

    jobs = [
        _job(tensor, stages.get(tensor.name), cast.deltas, source, targets[tensor.name], positions[tensor.name].layer)
        for tensor in alignment.tensors
    ]
    return jobs, tuple(files)


def _emptied(jobs: Sequence[TensorJob]) -> list[str]:
    """A note on the tensors of which some model's band keeps nothing although its density is above zero."""
    names = [
        job.name
        for job in jobs
        if job.stages is not None
        and prod(job.shape) > 0
        and any(
            begin >= end and share > 0
            for begin, end, share in zip(job.stages.rank_begin, job.stages.rank_end, job.stages.density, strict=False)
        )
    ]
    if not names:
        return []
    return [
        f"nothing of a model's delta is kept in {len(names)} tensors, whose segments are too short for density and gamma: {some(names)}"
    ]


def _clipped(recipe: Recipe, jobs: Sequence[TensorJob]) -> list[str]:
    """A note on the tensors of which fewer entries are kept than density says, because gamma leaves no room for them."""
    method = recipe.method
    shared = {name: method.parameter(name) for name in ("on_overflow", "outliers_first")}
    values = {name: resolve(parameter, (recipe.settings,), "", 0.0) for name, parameter in shared.items() if parameter is not None}
    if values != {"on_overflow": "drop", "outliers_first": True}:
        return []
    merged = [(job, job.stages) for job in jobs if job.stages is not None]
    model_numel = sum(prod(job.shape) for job, _ in merged)
    names = []
    for job, stages in merged:
        length = segment_length(stages.scope, job.shape, model_numel)
        bands = zip(stages.rank_begin, stages.rank_end, stages.density, strict=False)
        if any(end == length and end - begin < int(share * length) for begin, end, share in bands):
            names.append(job.name)
    if not names:
        return []
    return [f"fewer entries than density says are kept in {len(names)} tensors, because gamma removes too many: {some(names)}"]


def plan_merge(recipe: Recipe, cast: Cast, *, shard_size: int, seed: int = 0, allow_nonfinite: bool = False) -> PlannedMerge:
    """Plan a merge completely: headers, offsets and every tensor's stages.

    Parameters
    ----------
    recipe
        What to do.
    cast
        The opened models, from :func:`open_models`.
    shard_size
        Most bytes of tensors in one output file.
    seed
        Of the random masks, 0 <= seed < 2**64.
    allow_nonfinite
        Let NaN and infinities pass instead of raising.

    Raises
    ------
    CheckpointError
        If the models do not fit each other.
    RecipeError
        If a parameter has no value for some tensor, or values do not go together.
    """
    alignment = align(cast.reference, cast.tasks)
    layout = lay_out(
        [PlannedTensor(tensor.name, output_code(recipe, tensor), tensor.reference.shape) for tensor in alignment.tensors], shard_size
    )
    jobs, inputs = plan_jobs(recipe, cast, alignment, layout.targets)
    jobs.sort(key=lambda job: (job.target.file, job.target.offset))
    plan = MergePlan(
        inputs=inputs,
        outputs=layout.files,
        jobs=tuple(jobs),
        models=tuple(task.label for task in cast.settings),
        seed=seed,
        allow_nonfinite=allow_nonfinite,
        weight_map=layout.weight_map,
        total_size=layout.total_size,
    )
    return PlannedMerge(plan, cast, (*recipe.notes, *alignment.notes, *_emptied(jobs), *_clipped(recipe, jobs)))

"""Merges state dicts in memory, with the method table, the planner and the executor of a checkpoint merge."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from taskloom.merge.align import Alignment, align
from taskloom.merge.checkpoint import Checkpoint
from taskloom.merge.errors import CheckpointError, MergeError, RecipeError
from taskloom.merge.locate import Located
from taskloom.merge.memory import MEMORY, MemoryTensor, copied, describe, empty_like
from taskloom.merge.plan import MergePlan, TensorTarget
from taskloom.merge.planner import Cast, cast_models, output_code, plan_jobs
from taskloom.merge.recipe import Recipe, find_method, load_recipe
from taskloom.merge.stages import Method

_BASE = "base"

StateDict = Mapping[str, MemoryTensor]


def _described(argument: str, state_dict: object) -> dict[str, MemoryTensor]:
    if not isinstance(state_dict, Mapping):
        raise CheckpointError(f"{argument}: expected a mapping from names to tensors, got {type(state_dict).__name__}")
    found = {}
    for name, value in state_dict.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{argument}: expected names that are text, got {name!r}")
        found[name] = describe(value, f"{argument}: tensor {name!r}")
    return found


def _labelled(tuned: object) -> dict[str, dict[str, MemoryTensor]]:
    """The state dicts of ``tuned`` by label: their own, or ``tuned[0]``, ``tuned[1]``, ..."""
    if isinstance(tuned, Mapping):
        if tuned and not any(isinstance(value, Mapping) for value in tuned.values()):
            raise CheckpointError("tuned: expected a list of state dicts, or a mapping from labels to them, got one state dict")
        for label in tuned:
            if not isinstance(label, str) or not label or label == _BASE:
                raise RecipeError(f"tuned: expected labels that are text other than {_BASE!r}, got {label!r}")
        labelled = {label: _described(f"tuned[{label!r}]", state_dict) for label, state_dict in tuned.items()}
    elif isinstance(tuned, Sequence) and not isinstance(tuned, str | bytes):
        labelled = {f"tuned[{number}]": _described(f"tuned[{number}]", state_dict) for number, state_dict in enumerate(tuned)}
    else:
        raise CheckpointError(f"tuned: expected a list of state dicts, or a mapping from labels to them, got {type(tuned).__name__}")
    if not labelled:
        raise RecipeError("tuned: expected at least one state dict, got none")
    return labelled


def _plain(value: object) -> Any:
    """A number or array of numpy or torch as Python numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_one_per_model(value: object) -> bool:
    return isinstance(value, list | tuple) and not (value and all(isinstance(item, Mapping) for item in value))


def _split_parameters(method: Method, labels: Sequence[str], given: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The parameters of the whole merge, and those of each model."""
    shared: dict[str, Any] = {}
    own: list[dict[str, Any]] = [{} for _ in labels]
    for written, raw in given.items():
        name, value = "lambda" if written == "lambda_" else written, _plain(raw)
        if name in shared:
            raise RecipeError("lambda: given as lambda_ as well")
        parameter = method.parameter(name)
        if parameter is None or not parameter.per_model or not _is_one_per_model(value):
            shared[name] = value
            continue
        if len(value) != len(labels):
            raise RecipeError(f"{name}: expected one value or one per model ({len(labels)}), got {len(value)}")
        for settings, item in zip(own, value, strict=True):
            settings[name] = item
    return shared, own


def _dtype_name(dtype: Any) -> str | None:
    return dtype if dtype is None or isinstance(dtype, str) else str(getattr(dtype, "__name__", dtype))


def _recipe(
    method: Method, labels: Sequence[str], has_base: bool, given: Mapping[str, Any], seed: int, dtypes: Mapping[str, str | None]
) -> Recipe:
    if method.base == "required" and not has_base:
        raise RecipeError(f"base: {method.name} takes differences from a base's state dict, got None")
    shared, own = _split_parameters(method, labels, given)
    return load_recipe(
        {
            "merge_method": method.name,
            "base_model": _BASE if has_base else None,
            "models": [{"model": label, "parameters": settings} for label, settings in zip(labels, own, strict=True)],
            "parameters": shared,
            "seed": seed,
            **dtypes,
        }
    )


def _without_second_names(reference: StateDict, members: Sequence[StateDict]) -> tuple[dict[str, str], list[StateDict]]:
    """Names whose tensor every model that has them shares with an earlier name; and all models, reference first, without those."""
    first: dict[Any, str] = {}
    second: dict[str, str] = {}
    for name, tensor in reference.items():
        original = first.setdefault(tensor.identity, name)
        shares = (member[name].identity == member[original].identity for member in members if name in member and original in member)
        if original != name and all(shares):
            second[name] = original
    kept: list[StateDict] = []
    for model in (reference, *members):
        known = {tensor.identity for name, tensor in model.items() if name in reference}
        kept.append(
            {name: tensor for name, tensor in model.items() if name not in second and (name in reference or tensor.identity not in known)}
        )
    return second, kept


def _checkpoint(label: str, tensors: StateDict) -> Checkpoint:
    # State dicts say by shared memory what is tied, so nothing is left for a config to say.
    return Checkpoint(Located(label, MEMORY), {name: tensor.entry for name, tensor in tensors.items()}, {"tie_word_embeddings": False})


def _allocate(recipe: Recipe, alignment: Alignment, reference: StateDict, deltas: bool) -> dict[str, MemoryTensor]:
    """Fresh tensors for what is merged; where that is deltas, in the dtype that they are merged in."""
    found = {}
    for tensor in alignment.tensors:
        if tensor.members is None:
            continue
        wide = "F64" if any(entry.dtype == "F64" for entry in tensor.members) else "F32"
        code = wide if deltas else output_code(recipe, tensor)
        found[tensor.name] = empty_like(reference[tensor.name], code, f"tensor {tensor.name!r}")
    return found


def _one_device(models: Mapping[str, StateDict]) -> str:
    """The device that every tensor lies on."""
    first: tuple[str, str] | None = None
    for label, tensors in models.items():
        for name, tensor in tensors.items():
            if first is None:
                first = tensor.device, f"{label}: tensor {name!r}"
            elif tensor.device != first[0]:
                raise CheckpointError(f"{label}: tensor {name!r}: is on {tensor.device}, expected {first[0]} as {first[1]}")
    return "cpu" if first is None else first[0]


def _carry_out(plan: MergePlan, models: Sequence[StateDict], outputs: StateDict, device: str, threads: int) -> None:
    if device == "cpu":
        from taskloom.merge.execute import Executor

        Executor(plan, [0], [0], threads=threads, magnitude_histogram=False).run(0)
        return
    from taskloom.merge.device.choice import open_device
    from taskloom.merge.device.memory import merge_in_memory

    inputs = [tensor.owner for model in models for tensor in model.values()]
    merge_in_memory(plan, inputs, {name: tensor.owner for name, tensor in outputs.items()}, open_device(device))


def _plan(recipe: Recipe, cast: Cast, alignment: Alignment, outputs: StateDict, allow_nonfinite: bool) -> MergePlan:
    merged = Alignment(tuple(tensor for tensor in alignment.tensors if tensor.name in outputs), alignment.notes)
    targets = {name: TensorTarget(0, tensor.entry.offset, tensor.entry.dtype) for name, tensor in outputs.items()}
    jobs, _ = plan_jobs(recipe, cast, merged, targets)
    return MergePlan(
        inputs=(MEMORY,),
        outputs=(),
        jobs=tuple(jobs),
        models=tuple(task.label for task in cast.settings),
        seed=recipe.seed or 0,
        allow_nonfinite=allow_nonfinite,
    )


def _has_vectors(tuned: object) -> bool:
    """Whether a task vector is among the models; its class is not imported for that, which brings torch."""
    module = sys.modules.get("taskloom.merge.task_vector.algebra")
    values = tuned.values() if isinstance(tuned, Mapping) else tuned if isinstance(tuned, Sequence) else ()
    return module is not None and any(isinstance(value, module.Combination) for value in values)


def _add_to_base(
    recipe: Recipe, alignment: Alignment, reference: StateDict, merged: StateDict, allow_nonfinite: bool
) -> dict[str, MemoryTensor]:
    """The merged deltas plus the reference, in the output's dtypes."""
    from taskloom.merge.task_vector.beside_state_dicts import add_to_base
    from taskloom.merge.torch_dtypes import TORCH_DTYPES

    found = {}
    for tensor in alignment.tensors:
        if tensor.members is not None:
            name, dtype = tensor.name, TORCH_DTYPES[output_code(recipe, tensor)]
            total = add_to_base(reference[name].owner, merged[name].owner, dtype, f"tensor {name!r}", allow_nonfinite)
            found[name] = describe(total, f"tensor {name!r}")
    return found


def merge_state_dicts(
    base: Mapping[str, Any] | None,
    tuned: Sequence[Mapping[str, Any]] | Mapping[str, Mapping[str, Any]],
    method: str = "ties",
    *,
    seed: int = 0,
    threads: int = 0,
    dtype: Any = None,
    out_dtype: Any = None,
    allow_nonfinite: bool = False,
    **parameters: Any,
) -> dict[str, Any]:
    """Merge tensors in memory; the result is that of :func:`merge_checkpoints` for the same tensors, to the bit.

    Parameters
    ----------
    base
        State dict: names to torch tensors in CPU memory or numpy arrays, or to torch tensors on one CUDA device, which merges them
        where they are; of any shape and strides. float32, bfloat16, float16 and
        float64 are merged, everything else is copied from the base. None for ``passthrough``, and for ``linear`` without a base.
    tuned
        State dicts with the base's names and shapes, in a list, or by labels that errors name them by. Any of them may be a
        :class:`taskloom.TaskVector` instead, which stands for the base plus itself: the methods that merge differences take it as it is,
        ``linear`` and ``slerp`` its sum with the base. All tensors are torch's then, and finite even
        with ``allow_nonfinite``.
    method
        A merge method by its name in a recipe (``taskloom merge --list-methods``).
    seed
        Of random masks, 0 <= seed < 2**64.
    threads
        0 means all cores; the result does not depend on it.
    dtype, out_dtype
        Of the merged tensors, as text or as a dtype of torch or numpy; ``out_dtype`` goes first, None keeps the base's.
    allow_nonfinite
        Let NaN and infinities in the inputs pass instead of raising.
    **parameters
        The method's parameters by their names in a recipe (``lambda_`` for ``lambda``). A value is what a recipe has: a scalar, a
        gradient over the layers, or a list of ``{"filter": ..., "value": ...}``; but for parameters that a recipe may give under a
        model (``weight``, ``density``, ...) a sequence means one value per model.

    Returns
    -------
    dict[str, torch.Tensor | numpy.ndarray]
        In the order and of the kind of the base (the first of ``tuned`` where there is no base), in fresh memory. Names that are one
        tensor in every model (tied weights) are one tensor in the result.

    Raises
    ------
    RecipeError
        If the method or a parameter is unknown, missing, out of range or of the wrong length.
    CheckpointError
        If a state dict holds something else than tensors, or does not fit the base; names tensor and model.
    MergeError
        If a tensor holds NaN or infinity and ``allow_nonfinite`` is false.
    """
    if threads < 0:
        raise MergeError(f"threads: expected 0 (all cores) or more, got {threads}")
    row = find_method(method)
    deltas = False
    if _has_vectors(tuned):
        from taskloom.merge.task_vector.beside_state_dicts import takes_deltas, without_vectors

        tuned, deltas = without_vectors(base, tuned, row), takes_deltas(row)
    given = _labelled(tuned)
    of_base = None if base is None else _described("base", base)
    dtypes = {"dtype": _dtype_name(dtype), "out_dtype": _dtype_name(out_dtype)}
    recipe = _recipe(row, list(given), of_base is not None, parameters, seed, dtypes)

    models = {**({} if of_base is None else {_BASE: of_base}), **given}
    device = _one_device(models)
    order, (first, *rest) = list(models), list(models.values())
    second, unique = _without_second_names(first, rest)
    opened = {label: _checkpoint(label, tensors) for label, tensors in zip(order, unique, strict=True)}
    listed = [(entry, opened[entry.label]) for entry in recipe.models]
    cast = cast_models(recipe, opened.get(_BASE), listed)
    alignment = align(cast.reference, cast.tasks)
    reference = unique[0]
    outputs = _allocate(recipe, alignment, reference, deltas)
    if deltas:
        # The models are differences already: nothing is taken from them, and the base is added to what comes out.
        cast = replace(cast, deltas=False)
    _carry_out(_plan(recipe, cast, alignment, outputs, allow_nonfinite), unique, outputs, device, threads)
    if deltas:
        outputs = _add_to_base(recipe, alignment, reference, outputs, allow_nonfinite)
    merged = {name: outputs[name].owner if name in outputs else copied(tensor) for name, tensor in reference.items()}
    return {name: merged[second.get(name, name)] for name in first}

"""Turns a method's row and a recipe's settings into the numbers of one tensor's stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from taskloom._selection import band_ranks
from taskloom.merge.errors import RecipeError
from taskloom.merge.parameters import Position, Setting, resolve
from taskloom.merge.plan import Combine, Rescale, Scope, Stages
from taskloom.merge.stages import ELECT_STAGE, Method, Value

# mergekit leaves a mean undivided where the weights sum to less than this.
_NO_WEIGHT = 1e-8


@dataclass(frozen=True)
class Task:
    """A model that takes part in the merge, with the settings of its entry in the recipe."""

    label: str
    settings: Mapping[str, Setting]


@dataclass(frozen=True)
class TensorValues:
    """Every parameter of a method for one tensor: the shared ones by name, the per-model ones by name with a value per task."""

    shared: dict[str, Any]
    of_tasks: dict[str, tuple[Any, ...]]


def tensor_values(method: Method, settings: Mapping[str, Setting], tasks: Sequence[Task], name: str, position: Position) -> TensorValues:
    """Resolve filters, gradients and defaults for one tensor: a model's own settings first, then the recipe's."""
    shared: dict[str, Value] = {}
    of_tasks: dict[str, tuple[Value, ...]] = {}
    for parameter in method.parameters:
        if parameter.inert:
            continue
        if parameter.per_model:
            of_tasks[parameter.name] = tuple(resolve(parameter, (task.settings, settings), name, position.t, task.label) for task in tasks)
        else:
            shared[parameter.name] = resolve(parameter, (settings,), name, position.t)
    return TensorValues(shared, of_tasks)


def _combine(method: Method, values: TensorValues, name: str) -> Combine:
    if not values.shared.get("normalize", False):
        return "sum"
    if method.elected:
        return "disjoint_mean"
    if abs(sum(values.of_tasks["weight"])) >= _NO_WEIGHT:
        return "weighted_mean"
    if method.base == "member":
        raise RecipeError(f"weights sum to zero for tensor {name!r}, so they cannot be normalized; set normalize: false or other weights")
    return "sum"


def segment_length(scope: Scope, shape: tuple[int, ...], model_numel: int) -> int:
    """Entries that are ranked together: all of the tensor, its last dimension, or the whole model's."""
    if scope == "model":
        return model_numel
    return prod(shape) if scope == "tensor" or not shape else shape[-1]


def _band(method: Method, values: TensorValues, task: int, length: int, in_a_row: bool) -> tuple[int, int]:
    density = values.of_tasks["density"][task]
    if not method.band:
        return band_ranks(length, density, at_least_one=True)
    # The official code masks along the last dimension, so it leaves what has none as it is.
    if not in_a_row and density > 0:
        return 0, length
    overflow: Literal["drop", "density"] = values.shared["on_overflow"]
    first: bool = values.shared["outliers_first"]
    return band_ranks(length, density, values.of_tasks["gamma"][task], on_overflow=overflow, outliers_first=first)


def _check_della(density: Sequence[float], epsilon: Sequence[float], tasks: Sequence[Task], name: str) -> None:
    for share, spread, task in zip(density, epsilon, tasks, strict=True):
        if 0 < share < 1 and not (share - spread > 0 and share + spread < 1):
            raise RecipeError(
                f"epsilon {spread:g} of model {task.label!r} for tensor {name!r}: density {share:g} - epsilon and + epsilon must lie "
                "inside (0, 1)"
            )


def _selection(
    method: Method, values: TensorValues, tasks: Sequence[Task], name: str, shape: tuple[int, ...], model_numel: int
) -> dict[str, Any]:
    """The select stage's fields; empty where everything is kept."""
    if method.select == "all":
        return {}
    density = values.of_tasks["density"]
    if method.select == "magnitude":
        scope: Scope = values.shared["scope"]
        length = segment_length(scope, shape, model_numel)
        in_a_row = bool(shape) or scope != "row"
        bands = [_band(method, values, task, length, in_a_row) for task in range(len(tasks))]
        if all(band == (0, length) for band in bands):
            return {}
        return {
            "select": "magnitude",
            "scope": scope,
            "rank_begin": tuple(begin for begin, _ in bands),
            "rank_end": tuple(end for _, end in bands),
            "density": density,
        }
    if all(share >= 1 for share in density):
        return {}
    if method.select == "dropout":
        return {"select": "dropout", "density": density}
    epsilon = values.of_tasks["epsilon"]
    _check_della(density, epsilon, tasks, name)
    row = shape[-1] if shape else 1
    spread = tuple(value if 0 < share < 1 and row > 1 else 0.0 for share, value in zip(density, epsilon, strict=True))
    return {"select": "rank_dropout", "scope": "row", "density": density, "epsilon": spread}


def _rescale(method: Method, values: TensorValues, selected: bool) -> Rescale:
    rescale: Rescale = values.shared.get("rescale", "none")
    if rescale == "density" and method.select == "magnitude":
        raise RecipeError(f"parameters.rescale: density divides by a keep probability, which {method.name} does not have; use l1 or none")
    return rescale if selected else "none"


def tensor_stages(
    method: Method,
    settings: Mapping[str, Setting],
    tasks: Sequence[Task],
    name: str,
    shape: tuple[int, ...],
    position: Position,
    model_numel: int,
) -> Stages | None:
    """The stages of one tensor, with every number resolved; None for a plain copy (passthrough without a scale).

    Parameters
    ----------
    method, settings, tasks
        The recipe: its method's row, its own settings, and the models that take part.
    name, shape, position
        The tensor.
    model_numel
        Elements of all merged tensors of one model: the segment of ``scope: model``.

    Raises
    ------
    RecipeError
        If a parameter has no value for this tensor, or values do not go together.
    """
    values = tensor_values(method, settings, tasks, name, position)
    if method.base == "none":
        scale = values.of_tasks["scale"][0]
        return None if scale is None else Stages(weight=(scale,))
    if method.interpolation == "slerp":
        return Stages(weight=(1.0,) * len(tasks), interpolation="slerp", t=values.shared["t"])
    selection = _selection(method, values, tasks, name, shape, model_numel)
    return Stages(
        weight=values.of_tasks["weight"],
        rescale=_rescale(method, values, bool(selection)),
        elect=ELECT_STAGE[values.shared["elect"]] if method.elected else "none",
        zero_sign=values.shared.get("zero_sign", "positive"),
        vote=method.vote,
        # More than every task is as much as one more.
        consensus_k=min(values.shared.get("consensus_k", 0), len(tasks) + 1),
        tall_mask_lambda=values.of_tasks.get("tall_mask_lambda", ()),
        combine=_combine(method, values, name),
        scale=values.shared.get("lambda", 1.0),
        **selection,
    )


def _bands(stages: Stages, tasks: int) -> list[tuple[int, int] | None]:
    """A tensor's rank range per task; None where everything is kept."""
    return list(zip(stages.rank_begin, stages.rank_end, strict=True)) or [None] * tasks


def check_uniform_selection(stages: Mapping[str, Stages], tasks: Sequence[Task]) -> None:
    """Refuse ``scope: model`` where a task's band differs between tensors: one ranking of the whole model has one band.

    Raises
    ------
    RecipeError
        Naming the model and the two tensors.
    """
    first, *others = stages
    expected = _bands(stages[first], len(tasks))
    for name in others:
        for task, band, got in zip(tasks, expected, _bands(stages[name], len(tasks)), strict=True):
            if band != got:
                raise RecipeError(
                    f"scope: model needs one density and gamma per model, but those of {task.label!r} differ between tensors "
                    f"{first!r} and {name!r}"
                )

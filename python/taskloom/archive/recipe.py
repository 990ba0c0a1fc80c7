"""What a recipe means to ``taskloom compress``: the tasks with their names and thresholds, and how the shared vector is made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from taskloom.archive.format import why_no_task_name
from taskloom.merge.errors import RecipeError, near_miss
from taskloom.merge.locate import Located
from taskloom.merge.parameters import resolve
from taskloom.merge.planner import Cast
from taskloom.merge.recipe import Recipe, load_recipe
from taskloom.merge.resolve import Task
from taskloom.merge.stages import METHODS, TALL_MASKS, Method
from taskloom.merge.templates import recipe_template


@dataclass(frozen=True)
class Compression:
    """The settings of a compression: per task its name, TALL threshold and trim density; ``vector`` is ``sum`` or ``ties``."""

    tasks: tuple[str, ...]
    thresholds: tuple[float, ...]
    vector: str
    density: tuple[float, ...]


def find_archive_method(name: str) -> Method:
    """The row of ``tall_masks``; raises RecipeError with a hint for any other name."""
    if name == TALL_MASKS.name:
        return TALL_MASKS
    if name in METHODS:
        raise RecipeError(
            f"merge_method {name!r} makes a merged model and not an archive; run taskloom merge RECIPE OUT, "
            f"or compress with merge_method: {TALL_MASKS.name}"
        )
    hint = near_miss(name, [TALL_MASKS.name])
    raise RecipeError(f"merge_method {name!r} is unknown; compress knows {TALL_MASKS.name}{hint}")


def load_compress_recipe(source: str | Path | Mapping[str, Any]) -> Recipe:
    """Read and check a recipe whose merge_method is ``tall_masks``.

    Raises
    ------
    RecipeError
        If it cannot be read, has a key or a value that it may not have, or is a recipe of a merge.
    """
    recipe = load_recipe(source, find_archive_method)
    if recipe.output_dtype is not None:
        key = "dtype" if recipe.dtype is not None else "out_dtype"
        raise RecipeError(f"recipe: key {key!r} has no place in {TALL_MASKS.name}: every task is restored in its own dtype; remove the key")
    if recipe.seed is not None:
        raise RecipeError(f"recipe: key 'seed' has no place in {TALL_MASKS.name}: nothing is random; remove the key")
    return recipe


def default_task_name(located: Located) -> str:
    """The last component of a model's path (without ``.safetensors``) or of its hub id."""
    if located.hub_id:
        return located.hub_id.rpartition("/")[2]
    return os.path.basename(os.path.abspath(located.path)).removesuffix(".safetensors")


def _task_names(recipe: Recipe, cast: Cast) -> tuple[str, ...]:
    given = {entry.label: entry.task for entry in recipe.models}
    names: list[str] = []
    for setting, checkpoint in zip(cast.settings, cast.tasks, strict=True):
        name = given[setting.label] or default_task_name(checkpoint.located)
        wrong = why_no_task_name(name)
        if wrong is not None:
            raise RecipeError(f"task name {name!r} of model {setting.label!r} {wrong}; give another one with its key 'task'")
        if name in names:
            other = cast.settings[names.index(name)].label
            raise RecipeError(f"models {other!r} and {setting.label!r} are both task {name!r}; name them with their keys 'task'")
        names.append(name)
    return tuple(names)


def _value(recipe: Recipe, task: Task | None, name: str) -> Any:
    parameter = TALL_MASKS.parameter(name)
    assert parameter is not None
    sources = (recipe.settings,) if task is None else (task.settings, recipe.settings)
    return resolve(parameter, sources, "", 0.0, task.label if task else None)


def compression_of(recipe: Recipe, cast: Cast) -> Compression:
    """The settings of a recipe whose models are open.

    Raises
    ------
    RecipeError
        If two tasks share a name, a name cannot be one, a weight is not 1, or a density is given without ``vector: ties``.
    """
    for task in cast.settings:
        weight = _value(recipe, task, "weight")
        if weight != 1:
            raise RecipeError(
                f"weight {weight:g} of model {task.label!r}: expected 1: a task is restored as base + mask * vector, "
                "so that any other factor would restore another model"
            )
    vector = _value(recipe, None, "vector")
    if vector != "ties" and any("density" in settings for settings in (recipe.settings, *(task.settings for task in cast.settings))):
        raise RecipeError(f"parameter 'density' is the share that the trim of vector: ties keeps; vector is {vector}")
    return Compression(
        tasks=_task_names(recipe, cast),
        thresholds=tuple(_value(recipe, task, "tall_mask_lambda") for task in cast.settings),
        vector=vector,
        density=tuple(_value(recipe, task, "density") for task in cast.settings) if vector == "ties" else (),
    )


def pinned_recipe(recipe: Recipe, cast: Cast, compression: Compression) -> str:
    """The recipe as YAML that makes the same archive from any working directory: models pinned, tasks named."""
    document = yaml.safe_load(recipe.text)
    document["base_model"] = cast.reference.located.pinned
    models = {}
    for setting, checkpoint, name in zip(cast.settings, cast.tasks, compression.tasks, strict=True):
        models[setting.label] = {"model": checkpoint.located.pinned, "task": name}
    document["models"] = [{**entry, **models[entry["model"]]} for entry in document["models"] if entry["model"] in models]
    text: str = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    return text


def compress_template() -> str:
    """A ready-to-edit recipe for ``taskloom compress``."""
    lines = recipe_template(TALL_MASKS).splitlines()
    kept = [line for line in lines if not line.lstrip("# ").startswith(("Stages:", "Numbers such", "out_dtype:"))]
    document = []
    for line in kept:
        if line.lstrip().startswith("weight:"):
            continue
        if line.lstrip().startswith("density:"):
            line = line.replace("density:", "# density:")
        document.append(line)
        if line.startswith("  - model:"):
            document.append(f"    task: {line.rpartition('/')[2]}  # its name in the archive; default: the last part of the model's path")
    return "\n".join(document) + "\n"

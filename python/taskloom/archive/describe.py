"""What an archive built in memory says about itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import yaml

from taskloom.archive.format import ArchivedTask, ArchiveInfo
from taskloom.archive.pieces import CODES
from taskloom.archive.states import State, TaskStates
from taskloom.archive.tasks import VectorKind
from taskloom.merge.report import taskloom_version
from taskloom.merge.task_vector import TaskVector

_BASE = "base"


def _recipe(info: ArchiveInfo) -> str:
    """The recipe of ``taskloom compress`` for models with the tasks' names."""
    models: list[dict[str, Any]] = []
    for number, task in enumerate(info.tasks):
        settings = {"tall_mask_lambda": task.tall_mask_lambda}
        if info.density:
            settings["density"] = info.density[number]
        models.append({"model": task.model, "parameters": settings})
    document = {"merge_method": "tall_masks", "base_model": info.base_model, "models": models, "parameters": {"vector": info.vector}}
    text: str = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    return text


def _own_dtypes(states: TaskStates, state: State) -> dict[str, str]:
    if isinstance(state, TaskVector):
        return {}
    return {name: CODES[state[name].dtype] for name in states.names if state[name].dtype != states.base[name].dtype}


def info_of(states: TaskStates, method: VectorKind, trim: float, thresholds: Sequence[float]) -> ArchiveInfo:
    """An archive's metadata: models are called by their tasks, the base is called ``base``."""
    tasks = [
        ArchivedTask(name, name, threshold, _own_dtypes(states, state))
        for (name, state), threshold in zip(states.tasks.items(), thresholds, strict=True)
    ]
    info = ArchiveInfo(
        tasks=tuple(tasks),
        vector=method,
        density=(trim,) * len(tasks) if method == "ties" else (),
        tensors=len(states.names),
        parameters=sum(states.base[name].numel() for name in states.names),
        base_model=_BASE,
        recipe="",
        taskloom=taskloom_version(),
    )
    return replace(info, recipe=_recipe(info))

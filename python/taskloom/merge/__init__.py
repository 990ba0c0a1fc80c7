"""Merging of safetensors checkpoints by a recipe, in one streaming pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskloom.merge.diff import diff_checkpoints
    from taskloom.merge.errors import CheckpointError, MergeError, OutputError, RecipeError, ReportError
    from taskloom.merge.inspection import inspect_checkpoint
    from taskloom.merge.read_report import load_report
    from taskloom.merge.recipe import Recipe, load_recipe
    from taskloom.merge.report import MergeReport
    from taskloom.merge.run import merge_checkpoints
    from taskloom.merge.state_dicts import merge_state_dicts
    from taskloom.merge.task_vector import TaskVector
    from taskloom.merge.task_vector.checkpoints import merge_task_vectors
    from taskloom.merge.verify import verify_merge

_MODULES = {
    "CheckpointError": "errors",
    "MergeError": "errors",
    "MergeReport": "report",
    "OutputError": "errors",
    "Recipe": "recipe",
    "RecipeError": "errors",
    "ReportError": "errors",
    "TaskVector": "task_vector",
    "diff_checkpoints": "diff",
    "inspect_checkpoint": "inspection",
    "load_recipe": "recipe",
    "load_report": "read_report",
    "merge_checkpoints": "run",
    "merge_state_dicts": "state_dicts",
    "merge_task_vectors": "task_vector.checkpoints",
    "verify_merge": "verify",
}

__all__ = [
    "CheckpointError",
    "MergeError",
    "MergeReport",
    "OutputError",
    "Recipe",
    "RecipeError",
    "ReportError",
    "TaskVector",
    "diff_checkpoints",
    "inspect_checkpoint",
    "load_recipe",
    "load_report",
    "merge_checkpoints",
    "merge_state_dicts",
    "merge_task_vectors",
    "verify_merge",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""Task vectors among the state dicts of an in-memory merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from taskloom.merge.errors import CheckpointError, MergeError, RecipeError
from taskloom.merge.stages import Method
from taskloom.merge.task_vector.algebra import Combination
from taskloom.merge.task_vector.apply import changed_state_dict
from taskloom.merge.task_vector.checks import first_nonfinite, named_tensors
from taskloom.merge.task_vector.difference import difference

Given = Sequence[Any] | Mapping[str, Any]


def takes_deltas(method: Method) -> bool:
    """Whether a method looks at nothing but the models' differences from the base."""
    return method.base == "required" and method.interpolation == "none"


def _delta(base: Mapping[str, Tensor], model: object, where: str) -> dict[str, Tensor]:
    if not isinstance(model, Combination):
        return difference(base, model, None, True)
    unknown = [name for name in model if name not in base]
    if unknown:
        raise CheckpointError(f"{where}: has a delta of {unknown[0]!r}, which base lacks ({len(unknown)} such in all)")
    tensors = model.tensors()
    # What comes from a file lies where the base does.
    return {name: tensor if model.in_memory else tensor.to(base[name].device) for name, tensor in tensors.items()}


def _weights(base: Mapping[str, Tensor], model: object) -> object:
    return changed_state_dict(base, model._terms, model._slots, 1.0) if isinstance(model, Combination) else model


def without_vectors(base: Mapping[str, Any] | None, tuned: Given, method: Method) -> Given:
    """The same models with no task vector among them: each one's deltas, or for a method that merges values each one's weights.

    Raises
    ------
    RecipeError
        If there is no base, or vectors of both regimes.
    CheckpointError
        If a model does not fit the base.
    """
    models = tuned if isinstance(tuned, Mapping) else dict(enumerate(tuned))
    if base is None:
        raise RecipeError("base: a task vector among the models needs a base, got None")
    if len({model.regime for model in models.values() if isinstance(model, Combination)}) > 1:
        raise RecipeError("tuned: task vectors of both regimes; convert some with as_regime()")
    found: dict[Any, Any] = {}
    for label, model in models.items():
        where = f"tuned[{label!r}]"
        try:
            state = named_tensors(base, "base")
            if takes_deltas(method):
                found[label] = _delta(state, model, where)
            else:
                found[label] = _weights(state, model)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: {error.args[0]}") from error
    return found if isinstance(tuned, Mapping) else list(found.values())


def add_to_base(base: Tensor, merged: Tensor, dtype: torch.dtype, where: str, allow_nonfinite: bool) -> Tensor:
    """``base + merged``, rounded once to ``dtype``; raises MergeError where it overflows and that is not allowed."""
    with torch.no_grad():
        wide = torch.float64 if torch.float64 in (base.dtype, merged.dtype) else torch.float32
        total = merged.to(wide).add_(base).to(dtype)
        if not allow_nonfinite and first_nonfinite(total) is not None:
            raise MergeError(f"{where}: a value is too large for {dtype}; choose a wider out_dtype, or allow_nonfinite")
    return total

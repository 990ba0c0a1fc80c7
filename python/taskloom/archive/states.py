"""A base and its fine-tunings in memory, checked against each other once and read tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from taskloom.merge.align import is_recomputed, some
from taskloom.merge.task_vector import TaskVector
from taskloom.ops._checks import FLOATING

State = Mapping[str, Tensor]
Weights = State | nn.Module


def state_of(argument: str, weights: Weights) -> dict[str, Tensor]:
    """The tensors of a state dict or a module by name, without gradients; they share its memory.

    Raises
    ------
    TypeError
        If it is neither, or holds something else than tensors.
    """
    if isinstance(weights, TaskVector):
        raise TypeError(f"{argument}: expected a state dict or an nn.Module, got a TaskVector")
    given = weights.state_dict() if isinstance(weights, nn.Module) else weights
    if not isinstance(given, Mapping):
        raise TypeError(f"{argument}: expected a state dict or an nn.Module, got {type(given).__name__}")
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{argument}: {name!r}: expected a tensor, got {type(value).__name__}")
    return {name: value.detach() for name, value in given.items()}


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. A sum tells in most cases without a second tensor."""
    wide = torch.promote_types(values.dtype, torch.float32)
    return math.isfinite(float(values.sum(dtype=wide))) or bool(torch.isfinite(values).all())


def per_task(name: str, value: float | Mapping[str, float], tasks: Iterable[str]) -> list[float]:
    """One number for every task, from one for all or a mapping by task.

    Raises
    ------
    KeyError
        If the mapping lacks a task or names another.
    ValueError
        If a number is not finite.
    """
    names = list(tasks)
    if isinstance(value, Mapping):
        if value.keys() != set(names):
            raise KeyError(f"{name}: expected a number for each of the tasks {some(names)}, got them for {some(list(value))}")
        numbers = [value[task] for task in names]
    else:
        numbers = [value] * len(names)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise TypeError(f"{name}: expected a number or a mapping from tasks to numbers, got {type(number).__name__}")
        if not math.isfinite(number):
            raise ValueError(f"{name}: expected finite numbers, got {number}")
    return [float(number) for number in numbers]


def change_counts(states: TaskStates) -> list[int]:
    """How often torch has seen each tensor of the states change; tensors made in inference mode count nothing."""
    held = [state for state in (states.base, *states.tasks.values()) if not isinstance(state, TaskVector)]
    return [values._version for state in held for values in state.values() if not values.is_inference()]


def thresholds_of(value: float | Mapping[str, float], tasks: Iterable[str]) -> list[float]:
    """The tasks' ``tall_mask_lambda``; raises ValueError unless each is above zero."""
    found = per_task("tall_mask_lambda", value, tasks)
    for threshold in found:
        if threshold <= 0:
            raise ValueError(f"tall_mask_lambda: expected a finite number > 0, got {threshold:g}")
    return found


@dataclass(frozen=True)
class TaskStates:
    """A base and its fine-tunings.

    Attributes
    ----------
    base
        All tensors of the base.
    tasks
        The fine-tunings by task, each with at least the tensors in ``names``; a task vector has its changes in their place.
    names
        Tensors that have masks, in the base's order: floating point, and not recomputed by the model.
    wide
        Of these, those that are float64 in the base or in a task.
    tied
        Of these, those that are another one's memory in the base and in every task, and that one.
    """

    base: dict[str, Tensor]
    tasks: dict[str, State]
    names: tuple[str, ...]
    wide: frozenset[str]
    tied: dict[str, str]

    @property
    def ranked(self) -> list[str]:
        """The tensors that a trim over the whole model ranks, in the order in which equal magnitudes rank."""
        return sorted(name for name in self.names if name not in self.tied)

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor's changes are computed in: float64 where the base's or a task's tensor is, else float32."""
        return torch.float64 if name in self.wide else torch.float32

    def delta(self, task: str, name: str) -> Tensor:
        """A task's change of a tensor, in fresh memory."""
        state, dtype = self.tasks[task], self.dtype(name)
        if isinstance(state, TaskVector):
            return state[name].to(dtype, copy=True)
        return state[name].to(dtype) - self.base[name].to(dtype)

    def deltas(self, name: str) -> list[Tensor]:
        """The tasks' changes of a tensor, in fresh memory."""
        return [self.delta(task, name) for task in self.tasks]

    def pair(self, name: str) -> tuple[Tensor, list[Tensor]]:
        """What a tensor's changes are taken from, and the tasks' values of it; zeros and changes where a task is a task vector."""
        if any(isinstance(state, TaskVector) for state in self.tasks.values()):
            deltas = self.deltas(name)
            return torch.zeros_like(deltas[0]), deltas
        return self.base[name], [state[name] for state in self.tasks.values()]


def _check_like(where: str, name: str, values: Tensor, base: Tensor) -> None:
    if values.shape != base.shape:
        raise ValueError(f"{where}: tensor {name!r}: expected shape {tuple(base.shape)} as in the base, got {tuple(values.shape)}")
    if values.device != base.device:
        raise ValueError(f"{where}: tensor {name!r}: expected it on {base.device} as in the base, got {values.device}")


def _check_values(where: str, name: str, values: Tensor, base: Tensor) -> None:
    _check_like(where, name, values, base)
    if values.dtype not in FLOATING:
        raise TypeError(f"{where}: tensor {name!r}: expected floating point as in the base, got {values.dtype}")
    if not is_finite(values):
        raise ValueError(f"{where}: tensor {name!r} holds NaN or infinity")


def _check_task(where: str, state: State, base: State, names: tuple[str, ...]) -> set[str]:
    """Refuse a task that does not fit the base; returns its float64 tensors. A task vector's tensors are computed when they are read."""
    lacking = [name for name in names if name not in state]
    more = [name for name in state if name not in base and not is_recomputed(name)]
    if lacking or more:
        parts = ([f"lacks {some(lacking)}"] if lacking else []) + ([f"has {some(more)} besides"] if more else [])
        raise KeyError(f"{where}: expected the base's tensors; it {' and '.join(parts)}")
    wide = set()
    for name in names:
        own = state[name]
        _check_values(where, name, own, base[name])
        if own.dtype == torch.float64:
            wide.add(name)
    for name, values in base.items():
        if values.dtype in FLOATING or name not in state:
            continue
        own = state[name]
        _check_like(where, name, own, values)
        if own.dtype != values.dtype or not torch.equal(own, values):
            raise ValueError(
                f"{where}: {values.dtype} tensor {name!r} differs from the base's; only floating-point tensors have masks, so it could "
                "not be restored"
            )
    return wide


def _memory(values: Tensor) -> object:
    return (values.untyped_storage().data_ptr(), values.storage_offset(), values.shape, values.stride(), values.dtype)


def _is_tied(state: State, name: str, original: str) -> bool:
    if isinstance(state, TaskVector):
        return torch.equal(state[name], state[original])
    return _memory(state[name]) == _memory(state[original])


def _tied(base: State, tasks: Iterable[State], names: tuple[str, ...]) -> dict[str, str]:
    first: dict[object, str] = {}
    tied = {}
    for name in names:
        original = first.setdefault(_memory(base[name]), name)
        if original != name and base[name].numel() and all(_is_tied(state, name, original) for state in tasks):
            tied[name] = original
    return tied


def read_states(base: Weights, finetuned: Mapping[str, Weights]) -> TaskStates:
    """Check a base and its fine-tunings against each other.

    Parameters
    ----------
    base
        State dict or module.
    finetuned
        State dicts, modules or :class:`taskloom.TaskVector` by task, with the base's names and shapes. Tensors that are not floating point
        must be the base's, or be missing.

    Raises
    ------
    TypeError
        If an argument is something else, or a task's tensor is not floating point where the base's is.
    ValueError
        If there is no task or nothing that could have a mask, task vectors are of both regimes, shapes or devices differ, a weight is not
        finite, or a tensor without a mask differs from the base's.
    KeyError
        If the names differ.
    """
    origin = state_of("base", base)
    if not isinstance(finetuned, Mapping):
        raise TypeError(f"finetuned: expected a mapping from tasks to state dicts, modules or task vectors, got {type(finetuned).__name__}")
    if not finetuned:
        raise ValueError("finetuned: expected at least one task, got none")
    if len({weights.regime for weights in finetuned.values() if isinstance(weights, TaskVector)}) > 1:
        raise ValueError("finetuned: expected task vectors of one regime, got both; convert some with as_regime()")
    names = tuple(name for name, values in origin.items() if values.dtype in FLOATING and not is_recomputed(name))
    if not names:
        raise ValueError("base: expected at least one floating-point tensor, got none")
    for name in names:
        if not is_finite(origin[name]):
            raise ValueError(f"base: tensor {name!r} holds NaN or infinity")
    wide = {name for name in names if origin[name].dtype == torch.float64}
    tasks: dict[str, State] = {}
    for task, weights in finetuned.items():
        tasks[task] = weights if isinstance(weights, TaskVector) else state_of(f"task {task!r}", weights)
        wide |= _check_task(f"task {task!r}", tasks[task], origin, names)
    return TaskStates(origin, tasks, names, frozenset(wide), _tied(origin, tasks.values(), names))

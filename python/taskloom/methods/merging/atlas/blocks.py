"""The blocks of a model, and the task vectors as one list of tensors for each of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from taskloom.methods.merging.atlas.lowrank import LowRankTaskVector
from taskloom.nn.inject import matches
from taskloom.ops._checks import FLOATING

Vector = TypeVar("Vector")
Vectors = Sequence[Mapping[str, Tensor]] | Mapping[str, Mapping[str, Tensor]]
_SHOWN = 5


@dataclass(frozen=True)
class Blocks:
    """The parameters that a coefficient belongs to: ``names``, and all names of each (``aliases``) where modules share one."""

    names: tuple[str, ...]
    aliases: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Pool:
    """Task vectors over blocks: ``deltas[t][b]``, each vector's ``ids``; never written to, so copies of a model share them."""

    ids: tuple[str, ...]
    deltas: tuple[tuple[Tensor, ...], ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> Pool:
        return self

    def to(self, device: torch.device) -> Pool:
        """The same on another device, in their dtypes."""
        if all(one.device == device for task in self.deltas for one in task):
            return self
        return Pool(self.ids, tuple(tuple(one.to(device) for one in task) for task in self.deltas))


def shown(names: Iterable[str]) -> str:
    """A few names for a message."""
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(map(repr, listed[:_SHOWN])) + more


def meant_modules(model: nn.Module, target_modules: str | Sequence[str]) -> set[str]:
    """The paths of the modules that PEFT's ``target_modules`` mean."""
    modules = model.named_modules(remove_duplicate=False)
    if target_modules == "all-linear":
        return {path for path, module in modules if isinstance(module, nn.Linear)}
    return {path for path, _ in modules if matches(target_modules, path)}


def find_blocks(model: nn.Module, target_modules: str | Sequence[str] | None, matrices_only: bool) -> Blocks:
    """The parameters of a model that are blocks, in its order.

    Raises
    ------
    TypeError
        If one is no floating-point tensor.
    ValueError
        If there is none.
    """
    found: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(parameter, []).append(name)
    meant = set() if target_modules is None else meant_modules(model, target_modules)
    names = []
    for parameter, aliases in found.items():
        if matrices_only and parameter.dim() != 2:
            continue
        if target_modules is not None and not any(name.rpartition(".")[0] in meant for name in aliases):
            continue
        if parameter.dtype not in FLOATING:
            raise TypeError(f"model: parameter {aliases[0]!r}: expected a floating-point block, got {parameter.dtype}")
        names.append(tuple(aliases))
    if not names:
        asked = "a matrix among its parameters" if matrices_only else "a parameter"
        among = "" if target_modules is None else f" in the modules that target_modules={target_modules!r} means"
        raise ValueError(f"model: expected {asked}{among}, {type(model).__name__} has none")
    devices = {model.get_parameter(one[0]).device for one in names}
    if len(devices) > 1:
        raise ValueError(f"model: expected all blocks on one device, they are on {', '.join(sorted(map(str, devices)))}")
    return Blocks(tuple(one[0] for one in names), tuple(names))


def by_id(task_vectors: Sequence[Vector] | Mapping[str, Vector]) -> dict[str, Vector]:
    """The vectors by id: a mapping's keys, or ``task-0``, ``task-1``, ...; each is a mapping itself."""
    if isinstance(task_vectors, Mapping):
        named = {str(key): vector for key, vector in task_vectors.items()}
        if len(named) < len(task_vectors):
            raise ValueError(f"task_vectors: expected ids that differ as text, got {shown(map(str, task_vectors))}")
    else:
        named = {f"task-{place}": vector for place, vector in enumerate(task_vectors)}
    if not named:
        raise ValueError("task_vectors: expected at least one, got none")
    if any(isinstance(one, (Tensor, tuple)) for one in named.values()):
        raise TypeError("task_vectors: expected a sequence of task vectors, or a mapping from an id to each, got one vector")
    for key, vector in named.items():
        if not isinstance(vector, Mapping):
            raise TypeError(f"task_vectors: {key}: expected a TaskVector or a mapping of tensors, got {type(vector).__name__}")
    return named


def _delta(key: str, vector: Mapping[str, Tensor], aliases: Sequence[str], parameter: nn.Parameter) -> Tensor:
    """One block of one vector, on the parameter's device."""
    present = [name for name in aliases if name in vector]
    delta = vector[present[0]]
    where = f"task_vectors: {key}: {present[0]!r}"
    if not isinstance(delta, Tensor):
        raise TypeError(f"{where}: expected a tensor, got {type(delta).__name__}")
    if delta.dtype not in FLOATING:
        raise TypeError(f"{where}: expected a floating-point block, got {delta.dtype}")
    if delta.shape != parameter.shape:
        raise ValueError(
            f"{where}: expected shape {tuple(parameter.shape)} as the model's parameter {aliases[0]!r}, got {tuple(delta.shape)}"
        )
    for name in present[1:]:
        other = vector[name]
        if other is not delta and not torch.equal(other, delta):
            raise ValueError(f"{where}: differs from {name!r}, which is the same parameter in the model")
    return delta.detach().to(parameter.device).contiguous()


def check_finite(where: str, names: Sequence[str], blocks: Sequence[Tensor]) -> None:
    """Raise ValueError where a block holds NaN or infinity."""
    finite = torch.stack([torch.isfinite(one).all() for one in blocks])
    if not finite.all():
        bad = [name for name, fine in zip(names, finite.tolist(), strict=True) if not fine]
        raise ValueError(f"{where}: expected finite values, {shown(bad)} {'has' if len(bad) == 1 else 'have'} NaN or infinity")


def _check_regime(key: str, vector: Mapping[str, Tensor], regime: str) -> None:
    # A mapping that is no TaskVector does not say where its changes hold.
    found = getattr(vector, "regime", regime)
    if found != regime:
        raise ValueError(
            f"task_vectors: {key}: expected the regime {regime!r} with linearized={regime == 'linear'}, got {found!r}; "
            f"as_regime({regime!r}) takes it as such"
        )


def read_vectors(model: nn.Module, blocks: Blocks, task_vectors: Vectors, regime: str) -> Pool:
    """The checked blocks of each vector, on the model's device and in the vector's own dtype.

    Raises
    ------
    TypeError
        If a block is no floating-point tensor.
    ValueError
        If there is no vector, one lacks a block, has another shape, values that are not finite, or is of another regime.

    Warns
    -----
    UserWarning
        If a vector has names that are no parameter of the model, such as buffers.
    """
    named = by_id(task_vectors)
    given: Mapping[str, object] = named
    for key, one in given.items():
        if isinstance(one, LowRankTaskVector):
            raise TypeError(f"task_vectors: {key}: LowRankAtlasModel takes LoRA factors; dense() makes matrices of them")
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    own = [model.get_parameter(name) for name in blocks.names]
    deltas = []
    for key, vector in named.items():
        _check_regime(key, vector, regime)
        present = set(vector)
        absent = [aliases[0] for aliases in blocks.aliases if not present.intersection(aliases)]
        if absent:
            raise ValueError(
                f"task_vectors: {key}: lacks {shown(absent)}, {'a parameter' if len(absent) == 1 else 'parameters'} of "
                f"{type(model).__name__}; target_modules= chooses the modules that have blocks"
            )
        task = tuple(_delta(key, vector, aliases, parameter) for aliases, parameter in zip(blocks.aliases, own, strict=True))
        check_finite(f"task_vectors: {key}", blocks.names, task)
        beyond = sorted(present - parameters)
        if beyond:
            warnings.warn(
                f"AtlasModel: {key}: {shown(beyond)} {'is' if len(beyond) == 1 else 'are'} no parameter of {type(model).__name__}: ignored",
                stacklevel=4,
            )
        deltas.append(task)
    return Pool(tuple(named), tuple(deltas))

"""Writes tasks into live modules, and knows whether one still holds what was written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

import taskloom
from taskloom.merge.align import some
from taskloom.ops._checks import FLOATING

Tensors = Mapping[str, Tensor]


def module_tensors(module: nn.Module, base: Tensors, vector: Tensors) -> dict[str, Tensor]:
    """The module's own parameters and buffers for every tensor of the base.

    Raises
    ------
    KeyError
        If the module lacks one.
    ValueError, TypeError
        If one has another shape, lies on another device, or has a mask and is not floating point.
    """
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    lacking = [name for name in base if name not in own]
    if lacking:
        raise KeyError(f"apply_: module: expected the archive's tensors; it lacks {some(lacking)}")
    for name, values in base.items():
        target = own[name]
        if target.shape != values.shape:
            raise ValueError(f"apply_: module: {name!r}: expected shape {tuple(values.shape)}, got {tuple(target.shape)}")
        if target.device != values.device:
            raise ValueError(
                f"apply_: module: {name!r}: expected it on {values.device} as the archive, got {target.device}; move the archive with to()"
            )
        if name in vector and target.dtype not in FLOATING:
            raise TypeError(f"apply_: module: {name!r}: expected floating point, got {target.dtype}")
    return {name: own[name] for name in base}


@torch.no_grad()
def write_(targets: Tensors, base: Tensors, vector: Tensors, bits: Tensors) -> None:
    """Write a task: the base, and base + vector where bits are set."""
    for name, target in targets.items():
        target.copy_(base[name])
        if name in vector:
            taskloom.masked_switch_(target, base[name], vector[name], torch.zeros_like(bits[name]), bits[name])


@torch.no_grad()
def switch_(targets: Tensors, base: Tensors, vector: Tensors, old: Tensors, new: Tensors) -> None:
    """Switch from a task to another, touching only the entries in which their masks differ."""
    for name, values in vector.items():
        taskloom.masked_switch_(targets[name], base[name], values, old[name], new[name])


def _mark(target: Tensor) -> tuple[int, int] | None:
    # Tensors made in inference mode count no changes.
    return None if target.is_inference() else (target.data_ptr(), target._version)


@dataclass(frozen=True)
class Applied:
    """The task that a module was given, and how its tensors stood then."""

    task: str
    marks: dict[str, tuple[ReferenceType[Tensor], tuple[int, int] | None]]

    @classmethod
    def of(cls, task: str, targets: Tensors) -> Applied:
        """Now."""
        return cls(task, {name: (ref(target), _mark(target)) for name, target in targets.items()})

    def holds(self, targets: Tensors) -> bool:
        """Whether these are the same tensors, and nothing has changed them."""
        for name, (tensor, mark) in self.marks.items():
            target = targets[name]
            if tensor() is not target or mark is None or mark != _mark(target):
                return False
        return True

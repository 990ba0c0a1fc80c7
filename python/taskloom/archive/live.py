"""Writes tasks into live modules."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import taskloom
from taskloom.archive.tasks import restored_tensor
from taskloom.merge.align import is_recomputed, some
from taskloom.ops._checks import FLOATING, check_writable

Tensors = Mapping[str, Tensor]


def module_tensors(module: nn.Module, base: Tensors, vector: Tensors, bits: Tensors) -> dict[str, Tensor]:
    """The module's own parameters and buffers for every tensor of the base, to which the task of the bits can be written.

    Raises
    ------
    KeyError
        If the module lacks one.
    ValueError
        If one has another shape, lies on another device, repeats elements, is memory of the archive, is tied to one that the task has
        other values of, or is float16 where the task has values too large for it.
    TypeError
        If it is no module, or a tensor is not floating point where the base's is, or of another dtype where the base's is not.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"apply_: module: expected an nn.Module, got {type(module).__name__}")
    own = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    lacking = [name for name in base if name not in own and not is_recomputed(name)]
    if lacking:
        raise KeyError(f"apply_: module: expected the archive's tensors; it lacks {some(lacking)}")
    targets = {name: own[name] for name in base if name in own}
    for name, target in targets.items():
        _check_target(name, target, base[name])
    _check_apart(targets, (*base.values(), *vector.values()))
    _check_tied(targets, base, vector, bits)
    for name, target in targets.items():
        if target.dtype == torch.float16 and name in vector:
            restored_tensor(name, base[name], bits[name], vector[name], torch.float16)
    return targets


def _check_target(name: str, target: Tensor, values: Tensor) -> None:
    if target.shape != values.shape:
        raise ValueError(f"apply_: module: {name!r}: expected shape {tuple(values.shape)}, got {tuple(target.shape)}")
    if target.device != values.device:
        raise ValueError(
            f"apply_: module: {name!r}: expected it on {values.device} as the archive, got {target.device}; move the archive with to()"
        )
    if values.dtype in FLOATING and target.dtype not in FLOATING:
        raise TypeError(f"apply_: module: {name!r}: expected floating point, got {target.dtype}")
    if values.dtype not in FLOATING and target.dtype != values.dtype:
        raise TypeError(f"apply_: module: {name!r}: expected {values.dtype}, got {target.dtype}")
    check_writable("apply_", f"module: {name!r}", target)


def _check_apart(targets: Tensors, archive: tuple[Tensor, ...]) -> None:
    # load_state_dict(archive.base, assign=True) makes a module of the archive's own memory.
    held = {values.untyped_storage().data_ptr() for values in archive if values.numel()}
    for name, target in targets.items():
        if target.numel() and target.untyped_storage().data_ptr() in held:
            raise ValueError(f"apply_: module: {name!r}: is the archive's own memory; expected a module with memory of its own")


def _check_tied(targets: Tensors, base: Tensors, vector: Tensors, bits: Tensors) -> None:
    first: dict[object, str] = {}
    for name, target in targets.items():
        if not target.numel():
            continue
        original = first.setdefault((target.data_ptr(), target.dtype, target.shape, target.stride()), name)
        if original == name:
            continue
        one, other = ([part[key] for part in (base, vector, bits) if key in part] for key in (original, name))
        if len(one) != len(other) or not all(map(torch.equal, one, other)):
            raise ValueError(f"apply_: module: {original!r} and {name!r} are one tensor, of which the archive has two different ones")


@torch.no_grad()
def write_(targets: Tensors, base: Tensors, vector: Tensors, bits: Tensors) -> None:
    """Write a task: the base, and base + vector where bits are set, in one pass."""
    for name, target in targets.items():
        if name in vector:
            # From the opposite mask every entry changes.
            taskloom.masked_switch_(target, base[name], vector[name], ~bits[name], bits[name])
        else:
            target.copy_(base[name])

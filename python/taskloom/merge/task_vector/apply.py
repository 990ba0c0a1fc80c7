"""Adds a multiple of a task vector to weights."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping

import torch
from torch import Tensor, nn

from taskloom.merge.task_vector.checks import check_finite, check_overflow, first_nonfinite, is_delta, some
from taskloom.merge.task_vector.combination import Terms, coefficients, each_piece
from taskloom.merge.task_vector.difference import identity
from taskloom.merge.task_vector.sources import Slot
from taskloom.ops import block_scale_merge


def _check_target(target: Mapping[str, Tensor], slots: Mapping[str, Slot], what: str) -> None:
    missing = slots.keys() - target.keys()
    if missing:
        raise KeyError(f"TaskVector: apply_to: {what} lacks {some(missing)}, of which the vector has deltas")
    for name, slot in slots.items():
        tensor, where = target[name], f"TaskVector: apply_to: {name!r} of {what}"
        if not is_delta(tensor, where):
            raise TypeError(f"{where}: is {tensor.dtype}, expected floating point as the vector has a delta of it")
        if tuple(tensor.shape) != slot.shape:
            raise ValueError(f"{where}: has shape {tuple(tensor.shape)}, expected {slot.shape} as the vector")


def _add(target: Tensor, terms: Terms, name: str, slot: Slot, alpha: float) -> Tensor:
    """``target + alpha * delta`` in fresh memory, computed in float32 (float64 where anything is), rounded once to target's dtype."""
    base, where = target.detach().reshape(-1), f"TaskVector: apply_to: {name!r}"
    factors = [alpha * factor for factor in terms.values()]
    streams = any(source.streams for source in terms)
    result = torch.empty(slot.numel, dtype=base.dtype, device=base.device) if streams else base

    def put(begin: int, count: int, parts: list[Tensor]) -> None:
        here = base[begin : begin + count]
        moved = [part.to(base.device) for part in parts]
        summed = block_scale_merge(here, moved, coefficients(factors, moved, here, where))
        assert isinstance(summed, Tensor)
        if first_nonfinite(summed) is not None:
            check_finite(here, f"{where} of the target")
            check_overflow(summed, where, f"the target plus {alpha} times the delta")
        nonlocal result
        if streams:
            result[begin : begin + count] = summed
        else:
            result = summed

    if terms:
        each_piece(terms, name, slot.numel, put)
    # Where nothing was added it is still the target's.
    return (result.clone() if result is base else result).view(target.shape)


def _place(tensor: Tensor) -> Hashable:
    """Equal for two names of one tensor; of its own for what shares no memory."""
    has_memory = tensor.layout == torch.strided and tensor.numel() and not hasattr(tensor, "__tensor_flatten__")
    return identity(tensor) if has_memory else object()


def _changed(
    target: Mapping[str, Tensor], places: Mapping[str, Hashable], terms: Terms, slots: Mapping[str, Slot], alpha: float
) -> Iterator[tuple[str, Tensor, str]]:
    """Name and new value of every tensor with a delta, and the first name at its place.

    A second name of a tensor (tied weights) gets the first one's new tensor, where it comes out the same.
    """
    known: dict[Hashable, tuple[str, Tensor]] = {}
    for name, slot in slots.items():
        value = _add(target[name], terms, name, slot, alpha)
        first, earlier = known.setdefault(places[name], (name, value))
        yield name, earlier if earlier is not value and torch.equal(earlier, value) else value, first


def changed_state_dict(target: Mapping[str, Tensor], terms: Terms, slots: Mapping[str, Slot], alpha: float) -> dict[str, Tensor]:
    """A new state dict in fresh memory; names of one tensor stay that, unless they have different deltas."""
    _check_target(target, slots, "the state dict")
    places = {name: _place(tensor) for name, tensor in target.items()}
    new: dict[str, Tensor] = {}
    at: dict[Hashable, Tensor] = {}
    with torch.no_grad():
        for name, value, _ in _changed(target, places, terms, slots, alpha):
            new[name] = value
            at.setdefault(places[name], value)
        for name in target.keys() - new.keys():
            if places[name] not in at:
                at[places[name]] = target[name].clone()
            new[name] = at[places[name]]
    return {name: new[name] for name in target}


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers themselves, under every name that they have."""
    return {**dict(module.named_buffers(remove_duplicate=False)), **dict(module.named_parameters(remove_duplicate=False))}


def change_module(module: nn.Module, terms: Terms, slots: Mapping[str, Slot], alpha: float) -> None:
    """Change a module's tensors in place; nothing is written before everything is computed."""
    target, what = module_tensors(module), type(module).__name__
    _check_target(target, slots, what)
    new: dict[str, Tensor] = {}
    with torch.no_grad():
        places = {name: _place(target[name]) for name in slots}
        for name, value, first in _changed(target, places, terms, slots, alpha):
            if new.setdefault(first, value) is not value:
                raise ValueError(
                    f"TaskVector: apply_to: {name!r} and {first!r} are one tensor of {what}, but the vector has different deltas of them"
                )
        for name, value in new.items():
            target[name].copy_(value)

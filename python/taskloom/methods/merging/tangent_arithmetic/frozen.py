"""The two halves of a linearised model: a frozen copy of the base, and the trainable differences from it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

_WIDE = (torch.float32, torch.float64)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters are buffers of the same names; tied parameters stay one tensor."""
    frozen = copy.deepcopy(model).eval()
    buffers: dict[nn.Parameter, Tensor] = {}
    for module in frozen.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                module.register_buffer(name, buffers.setdefault(parameter, parameter.detach()))
    return frozen


def tied_names(*models: nn.Module) -> dict[str, tuple[str, ...]]:
    """All names of each floating-point parameter that are one tensor in every model, by the first of them.

    Raises
    ------
    TypeError
        If a parameter is complex.
    """
    parameters = [dict(model.named_parameters(remove_duplicate=False)) for model in models]
    names: dict[tuple[nn.Parameter, ...], list[str]] = {}
    for name, parameter in parameters[0].items():
        if parameter.is_complex():
            raise TypeError(f"LinearizedModel: parameter {name!r}: expected a floating-point or integer tensor, got {parameter.dtype}")
        if parameter.is_floating_point():
            names.setdefault(tuple(own[name] for own in parameters), []).append(name)
    return {own[0]: tuple(own) for own in names.values()}


def tau_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a difference of parameters of this dtype is kept in: float32, or float64."""
    return torch.promote_types(dtype, torch.float32)


class Differences(nn.Module):
    """Trainable tensors under dotted names; ``half()``, ``bfloat16()`` and ``to(dtype)`` leave them in float32 or float64."""

    def __init__(self, tensors: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        branches: dict[str, dict[str, nn.Parameter]] = {}
        for name, tensor in tensors.items():
            first, _, rest = name.partition(".")
            if rest:
                branches.setdefault(first, {})[rest] = tensor
            else:
                self.register_parameter(first, tensor)
        for first, branch in branches.items():
            self.add_module(first, Differences(branch))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Differences:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            # A difference in a narrow type would lose the small updates that it collects.
            return moved if moved.dtype in _WIDE or tensor.dtype not in _WIDE else tensor.to(moved.device)

        nn.Module._apply(self, keep, recurse)
        return self


def check_same(model: nn.Module, base: nn.Module) -> None:
    """Raise ValueError unless both have parameters of the same names, shapes and kinds, whose values are finite."""
    own, others = dict(model.named_parameters(remove_duplicate=False)), dict(base.named_parameters(remove_duplicate=False))
    if own.keys() != others.keys():
        here, there = sorted(own.keys() - others.keys()), sorted(others.keys() - own.keys())
        raise ValueError(
            f"LinearizedModel: init_model: expected the parameters of model; only model has {here[:3]}, only init_model has {there[:3]}"
        )
    for name, parameter in own.items():
        where, other = f"LinearizedModel: init_model: parameter {name!r}", others[name]
        if parameter.shape != other.shape:
            raise ValueError(f"{where}: expected shape {tuple(parameter.shape)}, got {tuple(other.shape)}")
        if parameter.is_floating_point() != other.is_floating_point():
            raise ValueError(f"{where}: expected a dtype as {parameter.dtype}, got {other.dtype}")
        for which, tensor in (("model", parameter), ("init_model", other)):
            if not torch.isfinite(tensor).all():
                raise ValueError(f"LinearizedModel: {which}: parameter {name!r} holds values that are not finite")

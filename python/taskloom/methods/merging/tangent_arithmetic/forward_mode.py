"""The first-order expansion of a function of parameters by one forward-mode pass, for outputs of any structure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.utils._pytree import tree_flatten, tree_unflatten

_NO_FORMULA = re.compile(r"Trying to use forward AD with (\S+) that does not support it")
_NO_JVP = ("override the setup_context staticmethod", "implement the jvp function for custom autograd.Function")
_MATH = "select the math attention backend: with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
_SLOW_PATH = "turn the fused path of attention layers off with torch.backends.mha.set_fastpath_enabled(False), and " + _MATH


@dataclass(frozen=True)
class Expansion:
    """The tensors among a function's outputs, at a point and their change along a direction; ``structure`` puts them back in place."""

    values: Sequence[Tensor]
    changes: Sequence[Tensor]
    structure: Callable[[Sequence[Tensor]], Any]


def _check_output(output: object) -> None:
    if not isinstance(output, Tensor):
        raise TypeError(
            f"LinearizedModel: outputs: expected tensors, alone or in tuples, lists, dicts or other registered pytrees, "
            f"got {type(output).__name__}"
        )
    if not output.is_floating_point():
        raise TypeError(f"LinearizedModel: outputs: expected floating-point tensors, got {output.dtype}, which has no derivative")


def _hint(operation: str) -> str:
    if "transformer_encoder_layer" in operation or "multi_head_attention" in operation:
        return _SLOW_PATH
    if "attention" in operation:
        return _MATH
    return "replace it by operations that have one"


def _place(traceback: TracebackType | None) -> str:
    """The innermost module and the innermost autograd.Function that an error went through."""
    module, function = "", ""
    while traceback is not None:
        names = traceback.tb_frame.f_locals
        one, cls = names.get("self"), names.get("cls")
        if isinstance(one, nn.Module):
            module = type(one).__name__
        if isinstance(cls, type) and issubclass(cls, torch.autograd.Function):
            function = cls.__name__
        traceback = traceback.tb_next
    return f"{function or 'an autograd.Function'} in {module or 'the model'}"


def _explained(error: RuntimeError) -> RuntimeError | None:
    found = _NO_FORMULA.search(str(error))
    if found is not None:
        operation = found[1].removeprefix("aten::")
        return RuntimeError(f"LinearizedModel: {operation} has no forward-mode derivative; {_hint(operation)}")
    if any(text in str(error) for text in _NO_JVP):
        return RuntimeError(
            f"LinearizedModel: {_place(error.__traceback__)} has no forward-mode derivative; give the function setup_context and jvp"
        )
    return None


def expand(function: Callable[[Mapping[str, Tensor]], Any], at: dict[str, Tensor], along: dict[str, Tensor]) -> Expansion:
    """Value of ``function`` at ``at`` and its directional derivative along ``along``.

    Parameters
    ----------
    function
        Of tensors by name. Its outputs are tensors, alone or in a pytree, where None may also be.
    at, along
        The point and the direction, of the same names, shapes and dtypes.

    Raises
    ------
    TypeError
        If an output is no floating-point tensor.
    RuntimeError
        If an operation has no forward-mode derivative; the message names it.
    """
    places: list[bool] = []
    specs: list[Any] = []

    def tensors(point: dict[str, Tensor]) -> tuple[Tensor, ...]:
        leaves, spec = tree_flatten(function(point))
        present = [leaf for leaf in leaves if leaf is not None]
        for leaf in present:
            _check_output(leaf)
        places[:], specs[:] = [leaf is not None for leaf in leaves], [spec]
        return tuple(present)

    try:
        found = jvp(tensors, (at,), (along,))
    except RuntimeError as error:
        explained = _explained(error)
        if explained is None:
            raise
        raise explained from error

    def structure(tensors: Sequence[Tensor]) -> Any:
        rest = iter(tensors)
        return tree_unflatten([next(rest) if present else None for present in places], specs[0])

    return Expansion(found[0], found[1], structure)

"""Composed weights in a model's modules during the backward pass, where checkpointed parts of its forward pass run again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

# A parameter's place: the module that holds it, and its name there.
Place = tuple[nn.Module, str]


def tensors_of(outputs: Any) -> Iterator[Tensor]:
    """The tensors in what a model returns, in mappings, sequences and dataclasses of any depth."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        for one in outputs.values():
            yield from tensors_of(one)
    elif isinstance(outputs, (list, tuple, set, frozenset)):
        for one in outputs:
            yield from tensors_of(one)
    elif is_dataclass(outputs):
        for field in fields(outputs):
            yield from tensors_of(getattr(outputs, field.name))
    elif hasattr(outputs, "__dict__") and not isinstance(outputs, (type, nn.Module)):
        for one in vars(outputs).values():
            yield from tensors_of(one)


class Recomputing:
    """Puts weights into modules when the backward pass of a forward pass begins, and takes them out when it has ended.

    ``torch.func.functional_call`` takes its weights out when the forward pass ends. A part of the model that was checkpointed runs again in
    the backward pass and would then meet the base's weights, and silently give the gradients of another model.
    """

    def __init__(self, places: Sequence[Sequence[Place]]) -> None:
        self._places = places
        self._originals: list[Tensor] | None = None
        self._node: Any = None

    def base(self) -> list[Tensor]:
        """The base's own parameters, also while others are in their place."""
        if self._originals is not None:
            return self._originals
        return [_parameters(module)[name] for ((module, name), *_) in self._places]

    def watch(self, outputs: Any, weights: Sequence[Tensor]) -> None:
        """See to it that a backward pass from any of a forward pass's outputs meets the weights of that pass."""
        node = weights[0].grad_fn
        if node is None:
            return
        # A node of the composition keeps them for as long as its graph lives; of another one they have to be kept here.
        kept = None if hasattr(node, "composer") else weights

        def install(gradients: Sequence[Tensor]) -> None:
            self._install(node, kept)

        seen = set()
        for one in tensors_of(outputs):
            if one.grad_fn is not None and one.grad_fn not in seen:
                seen.add(one.grad_fn)
                one.grad_fn.register_prehook(install)

    def restore(self) -> None:
        """Put back the base's parameters; a backward pass that raised has not."""
        if self._originals is not None:
            self._put(self._originals)
        self._originals = self._node = None

    def _install(self, node: Any, kept: Sequence[Tensor] | None) -> None:
        if self._node is node:
            return
        weights = node.saved_tensors if kept is None else kept
        if self._originals is None:
            self._originals = self.base()
            torch.autograd.Variable._execution_engine.queue_callback(self.restore)
        self._node = node
        self._put(weights)

    def _put(self, weights: Sequence[Tensor]) -> None:
        for places, weight in zip(self._places, weights, strict=True):
            for module, name in places:
                _parameters(module)[name] = weight


def _parameters(module: nn.Module) -> dict[str, Any]:
    # Composed weights are no nn.Parameter, which __setattr__ would insist on; functional_call puts them there in this way too.
    return cast(dict[str, Any], module._parameters)

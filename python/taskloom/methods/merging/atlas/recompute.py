"""Composed weights in a model's modules during the backward pass, where checkpointed parts of its forward pass run again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from taskloom.methods.merging.places import Place

# What a tensor in a module knows: the base's in whose place it is, and whether it was put there by hand. Several adapters may have one
# base, and a backward pass through them ends them in another order than it began them.
_OWN, _BY_HAND = "_taskloom_own", "_taskloom_by_hand"


def tensors_of(outputs: Any) -> Iterator[Tensor]:
    """The tensors in what a model returns: in mappings, sequences and objects of any depth."""
    found, seen = [outputs], set()
    while found:
        one = found.pop()
        if isinstance(one, Tensor):
            yield one
        elif id(one) not in seen:
            seen.add(id(one))
            found.extend(_parts(one))


def _parts(one: Any) -> Iterable[Any]:
    if isinstance(one, Mapping):
        return one.values()
    if isinstance(one, (list, tuple, set, frozenset)):
        return one
    if isinstance(one, (type, nn.Module)):
        return ()
    slots = [getattr(one, field.name) for field in fields(one)] if is_dataclass(one) else []
    return [*slots, *getattr(one, "__dict__", {}).values()]


@dataclass(frozen=True)
class _Installed:
    """Weights in the modules: for a backward pass (its number), by what they come from; or by hand (None)."""

    task: int | None
    origin: Any
    weights: Sequence[Tensor]
    statistics: tuple[tuple[nn.Module, dict[str, Any]], ...] = ()

    def left_over(self) -> bool:
        """Whether the backward pass has ended without taking them out, because it raised."""
        return self.task is not None and torch._C._current_graph_task_id() == -1


class _Leaving:
    """What is to be done when a backward pass ends: autograd calls it then, or drops it uncalled where the pass raised."""

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave: Callable[[], None] | None = leave

    def __call__(self) -> None:
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()

    __del__ = __call__


class Recomputing:
    """Puts weights into modules when the backward pass of a forward pass begins, and takes them out when it has ended.

    Layers with running statistics get copies of them for that time, so that those of the base are not updated.

    ``torch.func.functional_call`` takes its weights out when the forward pass ends. A part of the model that was checkpointed runs again in
    the backward pass and would then meet the base's weights, and silently give the gradients of another model.
    """

    def __init__(self, places: Sequence[Sequence[Place]], statistics: Sequence[nn.Module]) -> None:
        self._places = places
        self._statistics = statistics
        self._before: list[Tensor] = []
        self._own_statistics: list[tuple[nn.Module, dict[str, Any]]] = []
        self._now: _Installed | None = None

    def __getstate__(self) -> dict[str, Any]:
        self.expect_base("copied")
        return self.__dict__

    def expect_base(self, done: str) -> None:
        """Raise RuntimeError where other weights than the base's are in the modules, which a copy or a move would take for it."""
        self.base()
        if any(hasattr(one, _OWN) for one in self._in_place()):
            raise RuntimeError(
                f"AtlasModel: cannot be {done} while composed weights are in the model, as in installed() or a backward pass"
            )

    def base(self) -> list[Tensor]:
        """The base's own parameters, also while others are in their place."""
        if self._now is not None and self._now.left_over():
            self._enter(None)
        return [_own(one) for one in self._in_place()]

    def _in_place(self) -> list[Tensor]:
        return [_parameters(module)[name] for ((module, name), *_) in self._places]

    def watch(self, inputs: Any, outputs: Any, weights: Sequence[Tensor], shared: bool, again: Callable[[], Sequence[Tensor]]) -> None:
        """See to it that a backward pass from any of a forward pass's outputs meets the weights of that pass.

        ``shared`` says that other forward passes have the same weights; ``again`` composes them anew, for a second backward pass.
        """
        if not weights[0].requires_grad:
            return
        node = weights[0].grad_fn
        # A node of the composition keeps them until a backward pass frees it, so that a loss that is kept for a while does not; others and
        # leaves have to be kept here.
        kept = None if hasattr(node, "composer") and not shared else weights
        origin = weights[0] if node is None else node

        def install(gradients: Sequence[Tensor]) -> None:
            self._install(origin, kept, again)

        # A backward pass through what the model was given goes without it.
        seen = {one.grad_fn for one in tensors_of(inputs)}
        for one in tensors_of(outputs):
            if one.grad_fn is not None and one.grad_fn not in seen:
                seen.add(one.grad_fn)
                one.grad_fn.register_prehook(install)

    @contextmanager
    def installed(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Have weights in the modules inside the block."""
        before = self._now
        self._enter(_Installed(None, None, weights))
        try:
            yield
        finally:
            self._enter(before)

    def _install(self, origin: Any, kept: Sequence[Tensor] | None, again: Callable[[], Sequence[Tensor]]) -> None:
        before, task = self._now, torch._C._current_graph_task_id()
        same_pass = before is not None and before.task == task
        if same_pass and before is not None and before.origin is origin:
            return
        weights = self._weights(origin, again) if kept is None else kept
        if not same_pass:
            # A backward pass inside another one, as a reentrant checkpoint has it, gives the outer one its weights back.
            torch.autograd.Variable._execution_engine.queue_callback(_Leaving(lambda: self._leave(task, before)))
        statistics = before.statistics if same_pass and before is not None else self._copied_statistics()
        self._enter(_Installed(task, origin, weights, statistics))

    def _leave(self, task: int, before: _Installed | None) -> None:
        """The backward pass has ended; what it left over may have been taken out already."""
        if self._now is not None and self._now.task == task:
            self._enter(before)

    def _copied_statistics(self) -> tuple[tuple[nn.Module, dict[str, Any]], ...]:
        """Copies of the running statistics that a forward pass in training would change."""
        training = [one for one in self._statistics if one.training]
        return tuple((one, {name: buffer.clone() for name, buffer in one.named_buffers(recurse=False)}) for one in training)

    @staticmethod
    def _weights(origin: Any, again: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """What a composition's node keeps, composed anew where a backward pass, of another output or a reentrant checkpoint, freed it."""
        try:
            weights: Sequence[Tensor] = origin.saved_tensors
        except RuntimeError:
            return again()
        return weights

    def _enter(self, wanted: _Installed | None) -> None:
        own = self.base() if wanted is not None else []
        if self._now is None:
            self._before = [one if hasattr(one, _BY_HAND) else _own(one) for one in self._in_place()]
        if wanted is not None:
            for parameter, weight in zip(own, wanted.weights, strict=True):
                setattr(weight, _OWN, parameter)
                if wanted.task is None:
                    setattr(weight, _BY_HAND, True)
        self._put(self._before if wanted is None else wanted.weights)
        self._put_statistics(() if wanted is None else wanted.statistics)
        self._now = wanted
        if wanted is None:
            self._before = []

    def _put(self, weights: Sequence[Tensor]) -> None:
        for places, weight in zip(self._places, weights, strict=True):
            for module, name in places:
                _parameters(module)[name] = weight

    def _put_statistics(self, copies: Iterable[tuple[nn.Module, dict[str, Any]]]) -> None:
        for module, own in self._own_statistics:
            module._buffers.update(own)
        self._own_statistics = []
        for module, others in copies:
            own = {name: _own(module._buffers[name]) for name in others}
            for name, buffer in own.items():
                setattr(others[name], _OWN, buffer)
            self._own_statistics.append((module, own))
            module._buffers.update(others)


def _own(tensor: Any) -> Any:
    return getattr(tensor, _OWN, tensor)


def _parameters(module: nn.Module) -> dict[str, Any]:
    # Composed weights are no nn.Parameter, which __setattr__ would insist on; functional_call puts them there in this way too.
    return cast(dict[str, Any], module._parameters)

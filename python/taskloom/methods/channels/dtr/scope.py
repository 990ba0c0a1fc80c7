"""How a model whose forward is somebody else's tells its blocks the timesteps of a call."""

from __future__ import annotations

import inspect
import threading
from typing import Any

from torch import Tensor, nn

from taskloom.nn.change_class import change_class

_SCOPE = "_timestep_scope"


class TimestepScope:
    """The timesteps of the forward that is running, for the blocks inside it. Each thread has its own."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __reduce__(self) -> tuple[type[TimestepScope], tuple[()]]:
        return TimestepScope, ()

    def enter(self, t: Tensor | None) -> Tensor | None:
        """Hold these timesteps; returns those held before, to be given back afterwards."""
        before: Tensor | None = getattr(self._local, "t", None)
        self._local.t = t
        return before

    def current(self) -> Tensor:
        """The timesteps that are held.

        Raises
        ------
        RuntimeError
            If there are none.
        """
        t: Tensor | None = getattr(self._local, "t", None)
        if t is None:
            raise RuntimeError(
                "a routed block was called without timesteps outside its model's forward; where blocks are called apart, as activation "
                "checkpointing does on the way back, give it t as an argument"
            )
        return t


def timesteps_of(module: nn.Module, t: Tensor | None, samples: int) -> Tensor:
    """The timesteps given to a routed block, or else those of its model's running forward.

    Raises
    ------
    RuntimeError
        If there are neither.
    TypeError
        If ``t`` is no tensor.
    ValueError
        If there is not one timestep for each sample.
    """
    if t is None:
        scope: TimestepScope | None = module.__dict__.get(_SCOPE)
        if scope is None:
            raise RuntimeError(f"{type(module).__name__}: t: expected the timesteps, integers [N], got none")
        t = scope.current()
    if not isinstance(t, Tensor):
        raise TypeError(f"{type(module).__name__}: t: expected a tensor of integers, got {type(t).__name__}")
    if t.shape != (samples,):
        raise ValueError(f"{type(module).__name__}: t: expected shape ({samples},), one for each sample, got {tuple(t.shape)}")
    return t


def _telling_members(base: type[nn.Module], argument: str) -> dict[str, Any]:
    place = list(inspect.signature(base.forward).parameters).index(argument) - 1

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        scope: TimestepScope = self.__dict__[_SCOPE]
        given = kwargs[argument] if argument in kwargs else args[place] if len(args) > place else None
        before = scope.enter(given)
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            scope.enter(before)

    return {"forward": forward}


def check_can_tell(function: str, model: nn.Module, argument: str) -> None:
    """Raise ValueError where a model is routed already, TypeError where its forward has no argument of that name."""
    if _SCOPE in model.__dict__:
        raise ValueError(f"{function}: model: {type(model).__name__} is routed already")
    names = list(inspect.signature(type(model).forward).parameters)
    if argument not in names:
        raise TypeError(
            f"{function}: model: expected a forward with the argument {argument!r}, {type(model).__name__}'s has {', '.join(names[1:])}"
        )


def tell_timesteps(model: nn.Module, blocks: list[nn.Module], argument: str) -> None:
    """Make a model's forward tell its blocks its argument ``argument``."""
    scope = TimestepScope()
    for module in (model, *blocks):
        module.__dict__[_SCOPE] = scope
    change_class(model, _telling_members, argument)

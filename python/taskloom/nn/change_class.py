"""Gives one module of a model other members, by a subclass of its class of the same name."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

# Makes the members of a subclass, given the class and further arguments that can be hashed and pickled.
MakeMembers = Callable[..., dict[str, Any]]
# A subclass of nn.Module; mypy takes these for something that has no hash.
Class = Any

_MADE_BY = "_members_made_by"


@cache
def _derived(base: Class, make: MakeMembers, arguments: tuple[Any, ...]) -> type[nn.Module]:
    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _empty, (base, make, arguments), self.__dict__

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__, _MADE_BY: make}
    return type(base.__name__, (base,), {**names, "__reduce_ex__": reduce, **make(base, *arguments)})


def _empty(base: Class, make: MakeMembers, arguments: tuple[Any, ...]) -> nn.Module:
    made = _derived(base, make, arguments)
    return made.__new__(made)


def change_class(module: nn.Module, make: MakeMembers, *arguments: Any) -> None:
    """Make a module an instance of a subclass of its class, of the same name, with the members that ``make`` gives.

    Unlike a method on the instance this is kept by copies and pickles, and holds where the module calls its own ``self.forward``.
    """
    base: Class = type(module)
    module.__class__ = _derived(base, make, arguments)


def is_changed(module: nn.Module, make: MakeMembers) -> bool:
    """Whether the last change of the module's class was by ``make``."""
    return type(module).__dict__.get(_MADE_BY) is make


def is_changed_below(module: nn.Module, make: MakeMembers) -> bool:
    """Whether a change of the module's class by ``make`` lies under another one since, as by a parametrisation or fully_shard."""
    return not is_changed(module, make) and any(base.__dict__.get(_MADE_BY) is make for base in type(module).__mro__)


def restore_class(module: nn.Module, make: MakeMembers) -> None:
    """Undo :func:`change_class`.

    Raises
    ------
    ValueError
        If the last change of the module's class was not by ``make``.
    """
    if not is_changed(module, make):
        raise ValueError(f"{type(module).__name__}: its class was not changed, or was changed again since")
    module.__class__ = type(module).__bases__[0]

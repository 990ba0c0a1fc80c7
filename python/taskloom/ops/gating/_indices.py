"""Checks of indices that the wrappers share: of their dtype before a call, of their values where a kernel has found one that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

INDEX_DTYPES = (torch.int32, torch.int64)
# Places of entries are int32.
MOST_ENTRIES = (1 << 31) - 1


def check_indices(op: str, name: str, tensor: Tensor) -> None:
    """Raise TypeError unless ``tensor`` is a tensor of int32 or int64."""
    if isinstance(tensor, Tensor) and tensor.dtype in INDEX_DTYPES:
        return
    got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
    raise TypeError(f"{op}: {name}: expected a tensor of int32 or int64, got {got}")


def check_count(op: str, name: str, value: int, least: int = 1) -> None:
    """Raise unless ``value`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name}: expected an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{op}: {name}: expected at least {least}, got {value}")


def check_values(op: str, name: str, indices: Tensor, least: int, count: int, of: str) -> None:
    """Raise ValueError where an index is not ``least`` .. ``count - 1``; ``of`` says what it counts. The host waits for a GPU.

    Compiled code has no values to look at; under a torch.func transform they are those of the whole batch.
    """
    if torch.compiler.is_compiling():
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(indices):
        indices = torch._C._functorch.get_unwrapped(indices)
    wrong = ((indices < least) | (indices >= count)).reshape(-1)
    if bool(wrong.any()):
        place = int(wrong.int().argmax())
        got = int(indices.reshape(-1)[place])
        raise ValueError(f"{op}: {name}: expected {least} to {count - 1}, {of}, got {got} at entry {place}")


def assert_values(op: str, name: str, indices: Tensor, least: int, count: int, of: str) -> None:
    """The same for a GPU, which says so when it comes to it: the host does not wait."""
    inside = ((indices >= least) & (indices < count)).all()
    torch._assert_async(inside, f"{op}: {name}: expected {least} to {count - 1}, {of}")


def run_checked(run: Callable[..., Any], check: Callable[[], None], *arguments: Any) -> Any:
    """Run a kernel; where it raises, let ``check`` say what is wrong in the wrapper's words, if that is it."""
    try:
        return run(*arguments)
    except RuntimeError:
        if not torch.compiler.is_compiling():
            check()
        raise

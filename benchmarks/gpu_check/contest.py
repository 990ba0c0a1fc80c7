"""One op on one set of inputs on a device, beside other ways to the same result; and the check that comes before its speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import taskloom
from harness import check_close

Call = Callable[[], Any]
Make = Callable[[torch.device, torch.dtype, int], "Contest"]


@dataclass(frozen=True)
class Contest:
    """Inputs of an op, and calls on them.

    Attributes
    ----------
    ours
        Calls the op.
    bytes
        What the op must move at least, reads and writes together.
    peers
        The same by torch, by a name that says how. One that cannot run here raises, and its line says so.
    compiled
        A peer's function of tensors and its arguments, which is also measured under torch.compile.
    reset
        Puts back what a call changes; called before each of the two calls of the check.
    result
        What the check looks at; default: what the op returns.
    exact
        Whether values, and not only discrete results, must be the reference's own.
    tolerance
        The relative error allowed of values where it is not that of their dtype.
    """

    ours: Call
    bytes: int
    peers: Mapping[str, Call] = field(default_factory=dict)
    compiled: tuple[Callable[..., Any], tuple[Any, ...]] | None = None
    reset: Call | None = None
    result: Call | None = None
    exact: bool = False
    tolerance: float | None = None


@dataclass(frozen=True)
class Row:
    """A line of the table: an op and its use.

    Attributes
    ----------
    op, use
        As in the tables of the CPU's benchmarks.
    make
        Makes the inputs on a device, in a dtype, of so many entries.
    dtypes
        In which it is measured.
    bits
        Binary logarithm of the entries on a GPU that has the memory.
    aim
        ``share`` of the measured copy, and ``over``: a peer's name and how many times as long it is to take. Of bfloat16.
    """

    op: str
    use: str
    make: Make
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    bits: int = 26
    aim: Mapping[str, Any] = field(default_factory=dict)


def _copied(result: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, result)


def outcome(contest: Contest, backend: str) -> Any:
    """Copies of what the op gives on a backend, from the state that the contest was made in."""
    if contest.reset is not None:
        contest.reset()
    with taskloom.backend(backend):
        result = contest.ours()
    return _copied(result if contest.result is None else contest.result())


def gate(contest: Contest, backend: str) -> None:
    """Raise unless the backend gives on these inputs what the reference gives on them."""
    got = outcome(contest, backend)
    expected = outcome(contest, "reference")
    check_close(got, expected, contest.exact, contest.tolerance)
    if contest.reset is not None:
        contest.reset()

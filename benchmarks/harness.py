"""What every benchmark of ops shares: a row of a family's table, its gate, and its measurement beside peers and a large copy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import taskloom
from allocated import peak_allocated
from spread import summary

Call: TypeAlias = Callable[[], Any]
Shape: TypeAlias = tuple[int, int]

SHAPE: Shape = (2048, 2048)
COPY_BYTES = 1 << 26
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
_MOST_ROUNDS, _LEAST_ROUNDS, _ROW_SECONDS = 9, 3, 1.0


@dataclass(frozen=True)
class Contest:
    """One op on one set of inputs, beside other ways to the same result.

    Attributes
    ----------
    ours
        Calls the op.
    bytes
        What the op must move at least, reads and writes together.
    peers
        The same in torch eager, by a name that says how.
    shared
        Takes out of the op's result what the peers give too; None where they draw other random numbers.
    exact
        Whether the gate expects the reference's values themselves, not values near them.
    changes
        The tensor that the calls write in place, and that is compared.
    state
        Tensors that the calls change beside it: they are put back before a result is compared, and are not compared.
    sizes
        What else the JSON says of the inputs, beside shape and dtype.
    tolerance
        The relative error that the gate allows, where sums that cancel leave less than the dtype's.
    """

    ours: Call
    bytes: int
    peers: Mapping[str, Call]
    shared: Callable[[Any], Any] | None = lambda result: result
    exact: bool = False
    changes: Tensor | None = None
    state: Sequence[Tensor] = ()
    sizes: Mapping[str, float] = field(default_factory=dict)
    tolerance: float | None = None


@dataclass(frozen=True)
class Row:
    """A line of a family's table: one use of an op. Inputs are made when the row runs, and freed after it.

    ``memory`` says whether the memory that each call takes at most is measured too.
    """

    op: str
    make: Callable[[Shape, torch.dtype], Contest]
    use: str = ""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    shape: Shape = SHAPE
    memory: bool = False

    @property
    def name(self) -> str:
        return f"{self.op}, {self.use}" if self.use else self.op


def outcome(contest: Contest, call: Call) -> Any:
    """Copies of what a call gives; what it changed in place is put back."""
    changed = [*([] if contest.changes is None else [contest.changes]), *contest.state]
    before = [tensor.clone() for tensor in changed]
    result = call()
    if contest.changes is not None:
        result = contest.changes.clone()
    for tensor, old in zip(changed, before, strict=True):
        tensor.copy_(old)
    return result


def check_close(got: Any, expected: Any, exact: bool = False, tolerance: float | None = None) -> None:
    """Raise unless two results are the same: discrete values exactly, others by the relative Frobenius error that their dtype allows."""
    for ours, theirs in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise AssertionError(f"expected {theirs.dtype} of shape {tuple(theirs.shape)}, got {ours.dtype} of {tuple(ours.shape)}")
        if exact or not theirs.is_floating_point():
            if not torch.equal(ours, theirs):
                raise AssertionError(f"{int((ours != theirs).sum())} of {theirs.numel()} values differ, expected none")
            continue
        error = torch.linalg.vector_norm(ours.double() - theirs.double()) / torch.linalg.vector_norm(theirs.double())
        allowed = tolerance or TOLERANCES[theirs.dtype]
        if not error <= allowed:
            raise AssertionError(f"relative error {float(error):.1e}, expected at most {allowed}")


def gate(contest: Contest) -> None:
    """Raise unless the op gives on these inputs what its reference gives."""
    with taskloom.backend("native"):
        got = outcome(contest, contest.ours)
    with taskloom.backend("reference"):
        check_close(got, outcome(contest, contest.ours), contest.exact, contest.tolerance)


def large_copy() -> Call:
    """A copy between two tensors that no cache holds: its bandwidth is the ceiling of everything that streams."""
    source, target = torch.ones(COPY_BYTES // 4), torch.ones(COPY_BYTES // 4)
    return lambda: target.copy_(source)


def seconds_of(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def memory(contest: Contest) -> dict[str, int]:
    """Bytes that the op and each peer take at most beside their inputs, by name."""
    with taskloom.backend("native"):
        return {name: peak_allocated(call) for name, call in {"ours": contest.ours, **contest.peers}.items()}


def measure(contest: Contest, benchmark: Any, copy: Call) -> dict[str, Any]:
    """Time the op and its peers in turn, each call after a large copy, and compare round by round.

    Parameters
    ----------
    contest
        Whose gate has passed.
    benchmark
        pytest-benchmark's fixture, which times the op.
    copy
        :func:`large_copy`, the same for all rows.

    Returns
    -------
    dict
        Medians with lowest and highest, ready for the JSON; empty where pytest-benchmark was told to measure nothing.
    """
    peers: dict[str, list[float]] = {name: [] for name in contest.peers}
    copies: list[float] = []

    def others() -> None:
        for name, call in contest.peers.items():
            copy()
            peers[name].append(seconds_of(call))
        copies.append(seconds_of(copy))

    with taskloom.backend("native"):
        first = seconds_of(others) + seconds_of(contest.ours)
        for taken in (copies, *peers.values()):
            taken.clear()
        rounds = max(_LEAST_ROUNDS, min(_MOST_ROUNDS, int(_ROW_SECONDS / first)))
        benchmark.pedantic(contest.ours, setup=others, rounds=rounds)
    if benchmark.stats is None:
        return {}
    ours = benchmark.stats.stats.data
    return {
        "bytes": contest.bytes,
        "seconds": summary(ours),
        "gigabytes_per_second": summary([contest.bytes / own / 1e9 for own in ours]),
        "copy_gigabytes_per_second": summary([2 * COPY_BYTES / taken / 1e9 for taken in copies]),
        "share_of_copy": summary([contest.bytes / own / (2 * COPY_BYTES / taken) for own, taken in zip(ours, copies, strict=True)]),
        "peers": {
            name: {"seconds": summary(taken), "over_ours": summary([theirs / own for theirs, own in zip(taken, ours, strict=True)])}
            for name, taken in peers.items()
        },
    }

"""The benchmark tables: every op has a row, and what the rows compare gives the same results."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness import Contest, Row, check_close, gate, outcome
from taskloom.ops._backends import OPS

SHAPE = (16, 64)
FAMILIES = sorted(path.stem for path in (Path(__file__).parents[2] / "benchmarks").glob("bench_*.py"))
ROWS: tuple[Row, ...] = tuple(row for family in FAMILIES for row in getattr(importlib.import_module(family), "ROWS", ()))
rows = pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])


class Called(TorchDispatchMode):
    """Notes which ops of ours are called."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.namespace == "taskloom":
            self.ops.add(func._schema.name.removeprefix("taskloom::"))
        return func(*args, **(kwargs or {}))


def test_every_op_has_a_row() -> None:
    assert {row.op for row in ROWS} == set(OPS)


def test_no_name_is_used_twice() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


@rows
def test_a_row_times_the_op_that_it_names(row: Row) -> None:
    contest = row.make(SHAPE, row.dtypes[0])
    with Called() as called:
        contest.ours()
    assert called.ops == {row.op}


@rows
def test_gate_passes(row: Row) -> None:
    for dtype in row.dtypes:
        gate(row.make(SHAPE, dtype))


@rows
def test_peers_agree_with_the_op(row: Row) -> None:
    contest = row.make(SHAPE, row.dtypes[0])
    assert contest.peers
    for peer in contest.peers.values():
        if contest.shared is None:
            peer()
        else:
            check_close(outcome(contest, peer), contest.shared(outcome(contest, contest.ours)), tolerance=contest.tolerance)


@pytest.mark.parametrize("factor", [1.0001, torch.nan, torch.inf])
def test_gate_fails_for_a_wrong_result(factor: float) -> None:
    results = iter([factor * torch.ones(4), torch.ones(4)])
    with pytest.raises(AssertionError, match="relative error"):
        gate(Contest(lambda: next(results), 1, {}))


def test_gate_fails_for_a_wrong_mask() -> None:
    results = iter([torch.tensor([True, False]), torch.tensor([True, True])])
    with pytest.raises(AssertionError, match="1 of 2 values"):
        gate(Contest(lambda: next(results), 1, {}))


def test_gate_puts_back_what_an_op_changes() -> None:
    target = torch.zeros(4)
    gate(Contest(lambda: target.add_(1), 1, {}, changes=target))
    assert torch.equal(target, torch.zeros(4))

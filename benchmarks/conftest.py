"""Runs a row of a family's table, and prints the table at the end."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

import environment
from harness import Call, Row, gate, large_copy, measure, memory
from spread import spread

LINES = pytest.StashKey[list[tuple[str, ...]]]()
_COLUMNS = ("op", "dtype", "ours, ms", "GB/s", "of copy", "peer / ours")
_WIDTH = 140


@pytest.fixture(scope="session")
def copy() -> Call:
    return large_copy()


@pytest.fixture(scope="session")
def surroundings() -> dict[str, Any]:
    """What was measured, on what, and with what."""
    return {
        "device": environment.device(),
        "versions": environment.versions(),
        "threads": torch.get_num_threads(),
        **environment.commit(),
    }


def _line(row: Row, dtype: str, found: dict[str, Any]) -> tuple[str, ...]:
    ratios = "\n".join(f"{spread(peer['over_ours'], 1)} {name}" for name, peer in found["peers"].items())
    seconds, speed, share = (found[key]["median"] for key in ("seconds", "gigabytes_per_second", "share_of_copy"))
    return (row.name, dtype, f"{1e3 * seconds:.2f}", f"{speed:.2f}", f"{share:.0%}", ratios)


@pytest.fixture
def run_row(benchmark: Any, copy: Call, surroundings: dict[str, Any], request: pytest.FixtureRequest) -> Callable[[Row, torch.dtype], None]:
    """Gate, then measure: no speed is measured of an op that fails its gate."""

    def run(row: Row, dtype: torch.dtype) -> None:
        contest = row.make(row.shape, dtype)
        gate(contest)
        kind = str(dtype).removeprefix("torch.")
        benchmark.group = row.name
        benchmark.extra_info.update(surroundings, op=row.op, use=row.use, dtype=kind, sizes={"shape": row.shape, **contest.sizes})
        found = measure(contest, benchmark, copy)
        if found:
            benchmark.extra_info.update(found)
            if row.memory:
                benchmark.extra_info["peak_allocated_bytes"] = memory(contest)
            request.config.stash.setdefault(LINES, []).append(_line(row, kind, found))

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Leave the machine's name, and that of its build of the kernel, out of the JSON."""
    machine_info.pop("node", None)
    machine_info["release"] = str(machine_info.get("release")).partition("-")[0]


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Leave the names of the folder and the branch out of the JSON, and say in words which row a benchmark was."""
    for name in ("project", "branch"):
        output_json["commit_info"].pop(name, None)
    for found in output_json["benchmarks"]:
        found["params"] = {key: found["extra_info"][key] for key in ("op", "use", "dtype")}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(LINES, [])
    if not lines:
        return
    table = Table(*_COLUMNS, title="ops, medians; ratios with (lowest-highest)")
    for place in (2, 3, 4):
        table.columns[place].justify = "right"
    for cells in lines:
        table.add_row(*cells)
    text = io.StringIO()
    Console(file=text, width=_WIDTH).print(table)
    device = environment.device()
    terminalreporter.section("ops")
    terminalreporter.write_line(
        f"{device['cpu']}, {torch.get_num_threads()} threads, level {device['cpu_level']}, torch {torch.__version__}"
    )
    terminalreporter.write_line(text.getvalue())

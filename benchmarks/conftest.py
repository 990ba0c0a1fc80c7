"""Runs a row of a benchmark table, and prints the table at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from harness import Row, environment, figures, line

LINES = pytest.StashKey[list[str]]()


@pytest.fixture
def run_row(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Row, torch.dtype], None]:
    """Gate, time, compare: no speed is measured of an op that fails its gate."""

    def run(row: Row, dtype: torch.dtype) -> None:
        contest = row.make(dtype)
        contest.gate()
        benchmark.group = row.name
        benchmark.extra_info.update(environment(), dtype=str(dtype))
        benchmark.pedantic(contest.ours, rounds=5, warmup_rounds=1)
        if benchmark.stats is None:
            return
        seconds = benchmark.stats.stats.median
        found = figures(contest, seconds)
        benchmark.extra_info.update(found)
        lines = request.config.stash.setdefault(LINES, [])
        lines.append(line(f"{row.name}, {str(dtype).removeprefix('torch.')}", seconds, found))

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    lines = config.stash.get(LINES, [])
    if not lines:
        return
    terminalreporter.section("speed and peers")
    terminalreporter.write_line(", ".join(f"{key} {value}" for key, value in environment().items()))
    for text in lines:
        terminalreporter.write_line(text)

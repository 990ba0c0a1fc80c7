"""What several commands print: tables, sizes, JSON, and a progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

# Of a table that goes into a file or a pipe: no line is ever broken there.
_UNLIMITED = 10_000


def print_json(content: Any) -> None:
    """JSON with two spaces on standard output."""
    import json

    click.echo(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False))


def size(count: float) -> str:
    """Bytes in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def number(value: float | None) -> str:
    """A figure in three digits; ``-`` where there is none."""
    return "-" if value is None else f"{value:.3g}"


def shape(sizes: Sequence[int]) -> str:
    """``4096 x 512``; ``scalar`` where there are no dimensions."""
    return " x ".join(map(str, sizes)) or "scalar"


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """A table of plain text; the first ``left`` columns are aligned to the left, the others to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(width=None if sys.stdout is not None and sys.stdout.isatty() else _UNLIMITED, highlight=False)
    console.print(table)


@contextmanager
def progress_bar(shown: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar on standard error, only where that is a terminal; it is given a stage, what is done of it, and of how much."""
    if not shown or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=None)
        yield lambda stage, done, total: progress.update(bar, description=stage, completed=done, total=total)


@contextmanager
def byte_bar(label: str, total: int, shown: bool) -> Iterator[Callable[[int], None] | None]:
    """A bar that counts bytes up to ``total`` on standard error, only where that is a terminal."""
    if not shown or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    # Drawn when there is news, without a thread of its own: a thread has a stack and a heap.
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
        bar = progress.add_task(label, total=total)
        yield lambda done: progress.update(bar, completed=done, refresh=True)

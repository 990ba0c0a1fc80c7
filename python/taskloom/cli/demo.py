"""``taskloom demo``: small models built, merged by the real command, evaluated, and shown."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from taskloom.methods.merging.demo.errors import DemoError, require_extra

if TYPE_CHECKING:
    from taskloom.methods.merging.demo.results import DemoResults, Row

_WIDTH_WITHOUT_TERMINAL = 120
# Columns of characters that the table takes without tasks, and one task's share.
_WIDTH_OF_MEANS = 52
_WIDTH_OF_TASK = 7


def _cells(row: Row, by_task: bool) -> list[str]:
    return [
        row.name,
        *(f"{value:.3f}" for value in row.accuracy if by_task),
        f"{row.mean:.3f}",
        f"{row.normalised:.3f}",
        "" if row.alpha is None else f"{row.alpha:g}",
        "" if row.seconds is None else f"{row.seconds:.2f}",
        "" if row.bytes_written is None else f"{row.bytes_written / 1e6:.2f}",
    ]


def _print_table(results: DemoResults) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL)
    by_task = console.width >= _WIDTH_OF_MEANS + _WIDTH_OF_TASK * results.tasks
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("model")
    for name in (*(f"t{task}" for task in range(results.tasks) if by_task), "mean", "norm.", "alpha", "s", "MB"):
        table.add_column(name, justify="right", style="bold" if name == "mean" else None, no_wrap=True)
    previous = None
    for row in results.rows:
        merged = row.seconds is not None
        if previous is not None and merged != previous:
            table.add_section()
        table.add_row(*_cells(row, by_task), style="cyan" if merged else None)
        previous = merged
    console.print(table)
    if not by_task:
        click.echo("accuracy by task: in the report")


def _print_summary(results: DemoResults, page: Path) -> None:
    found = results.compression
    click.echo("test accuracy; norm. = share of single-task accuracy; alpha picked on validation data; s = wall time of the command")
    click.echo(
        f"TALL masks: {results.tasks} checkpoints of {found.separate_bytes / 1e6:.2f} MB stored in {found.stored_bytes / 1e6:.2f} MB "
        f"({found.ratio:.1%}) at {results.row('tall_restored').normalised:.1%} of single-task accuracy"
    )
    click.echo(f"{results.seconds['total']:.1f} s in all; report: {page}")


def _demo(out: Path, seed: int, tasks: int, as_json: bool) -> None:
    require_extra()
    from taskloom.methods.merging.demo.folder import prepare_folder

    folder = prepare_folder(out)
    click.echo("importing torch and scikit-learn ...", err=True)
    from taskloom.methods.merging.demo.page import write_page
    from taskloom.methods.merging.demo.run import run_demo, write_results

    results = run_demo(folder, seed=seed, tasks=tasks, say=lambda line: click.echo(line, err=True))
    write_results(results, folder.results)
    write_page(results, folder.page)
    if as_json:
        click.echo(folder.results.read_text(encoding="utf-8"), nl=False)
    else:
        _print_table(results)
        _print_summary(results, out / folder.page.name)


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="demo_out",
    show_default=True,
    help="Folder to write; one of an earlier demo is replaced.",
)
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="Seed of everything random.")
@click.option("--tasks", type=click.IntRange(2, 16), default=8, show_default=True, help="Number of fine-tuned models.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON instead of a table.")
@click.option("--debug", is_flag=True, help="Show a traceback for errors.")
def demo(out: Path, seed: int, tasks: int, as_json: bool, debug: bool) -> None:
    """Fine-tune small models on handwritten digits, merge them by several methods, and show how well each merge works.

    Needs the extra ``demo`` (scikit-learn, matplotlib). Writes the models, recipes, merged models, results.json and report.html.
    """
    from taskloom.merge.errors import MergeError

    try:
        _demo(out, seed, tasks, as_json)
    except (DemoError, MergeError) as error:
        if debug:
            raise
        raise click.ClickException(str(error)) from error

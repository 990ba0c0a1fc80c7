"""``taskloom report``: the report of a finished merge as a page for a browser."""

from __future__ import annotations

from pathlib import Path

import click

from taskloom.cli.errors import reported


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--out", "page", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="File to write instead.")
@click.option("--quiet", "-q", is_flag=True, help="Do not print the file's name.")
@click.option("--debug", is_flag=True, help="Show a traceback for errors.")
def report(out: Path, page: Path | None, quiet: bool, debug: bool) -> None:
    """Write OUT/merge_report.html, the report of the merge in the folder OUT (or of the file OUT, a merge_report.json).

    The page is one file that needs no network. A page that is there already is replaced.
    """
    from taskloom.merge.page import PAGE, recipe_beside, write_page
    from taskloom.merge.read_report import load_report

    with reported(debug):
        folder = out if out.is_dir() else out.parent
        target = page or folder / PAGE
        write_page(load_report(out), recipe_beside(folder), target)
    if not quiet:
        click.echo(f"page: {target}")

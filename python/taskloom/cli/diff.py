"""``taskloom diff``: the differences of two checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from taskloom.cli.errors import reported
from taskloom.cli.tables import number, print_json, print_table, progress_bar, shape

if TYPE_CHECKING:
    from taskloom.merge.diff import DiffReport, TensorDiff

_MISMATCHES = {"dtype": "other dtype", "shape": "other shape", "only_a": "only in A", "only_b": "only in B"}


class TroubleError(click.ClickException):
    """Checkpoints that cannot be compared: status 2, as diff(1) has it."""

    exit_code = 2


def _order(tensor: TensorDiff) -> tuple[bool, float]:
    worst = float("inf") if tensor.nonfinite or tensor.relative_norm is None else tensor.relative_norm
    return tensor.status in ("shape", "only_a", "only_b"), worst


def _either(first: str | None, second: str | None) -> str:
    if first == second:
        return first or "-"
    return f"{first} / {second}" if first and second else first or second or "-"


def _row(tensor: TensorDiff) -> tuple[str, ...]:
    shapes = [None if sizes is None else shape(sizes) for sizes in (tensor.shape_a, tensor.shape_b)]
    return (
        tensor.name,
        _MISMATCHES.get(tensor.status, tensor.status),
        _either(tensor.dtype_a, tensor.dtype_b),
        _either(*shapes),
        f"{tensor.changed:,}" if tensor.entries else "-",
        f"{tensor.changed / tensor.entries:.2%}" if tensor.entries else "-",
        number(tensor.max_abs),
        number(tensor.relative_norm),
        f"{tensor.nonfinite:,}" if tensor.nonfinite else "",
    )


def _print(report: DiffReport, top: int) -> None:
    totals = report.totals
    differing = sorted((tensor for tensor in report.tensors if tensor.status != "same"), key=_order, reverse=True)
    if differing and top:
        columns = ("tensor", "status", "dtype", "shape", "changed", "share", "max abs", "rel. norm", "NaN, inf")
        print_table(columns, [_row(tensor) for tensor in differing[:top]], left=4)
        if len(differing) > top:
            click.echo(f"and {len(differing) - top} tensors more (--top)")
    parts = [f"{totals.same} the same", f"{totals.changed} changed"]
    parts += [f"{count} {name}" for status, name in _MISMATCHES.items() if (count := getattr(totals, status))]
    click.echo(f"{totals.tensors} tensors: {', '.join(parts)}")
    click.echo(
        f"{totals.changed_entries:,} of {totals.entries:,} entries changed ({totals.changed_share:.2%}), "
        f"max abs {number(totals.max_abs)}, relative norm {number(totals.relative_norm)}"
    )


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--tensor", metavar="PATTERN", help="Only tensors whose name matches a glob such as '*.mlp.*'.")
@click.option("--tolerance", type=click.FloatRange(min=0), default=0.0, help="Largest |a - b| that is no difference; default 0: bits.")
@click.option("--top", type=click.IntRange(min=0), default=20, show_default=True, help="Rows of the table: the largest relative norms.")
@click.option("--threads", "-j", type=click.IntRange(min=0), default=0, help="Threads; 0 (default) uses all cores.")
@click.option("--json", "as_json", is_flag=True, help="Print all tensors as JSON.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing; the exit status tells.")
@click.option("--debug", is_flag=True, help="Show a traceback for errors.")
def diff(a: str, b: str, tensor: str | None, tolerance: float, top: int, threads: int, as_json: bool, quiet: bool, debug: bool) -> None:
    """Compare the checkpoints A and B tensor by tensor: folders, .safetensors files or hub ids.

    The exit status is 0 where they are the same, 1 where they differ, 2 where they cannot be compared.
    """
    from taskloom.merge.diff import diff_checkpoints

    with reported(debug, TroubleError):
        with progress_bar(shown=not (quiet or as_json)) as progress:
            report = diff_checkpoints(a, b, tolerance=tolerance, tensor=tensor, threads=threads, progress=progress)
        if as_json:
            print_json(report.to_dict())
        elif not quiet:
            _print(report, top)
    if not report.same:
        raise SystemExit(1)

"""``taskloom verify``: check a finished merge, with a sample of its tensors computed again by the reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from taskloom.cli.errors import reported
from taskloom.cli.tables import number, print_json, print_table, progress_bar, size

if TYPE_CHECKING:
    from taskloom.merge.verify.report import TensorCheck, VerifyReport

_WORST = 10
_SHOWN = 20


def _share(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    written = value.strip()
    try:
        share = float(written.removesuffix("%")) / (100 if written.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise click.BadParameter(f"expected a share such as 5% or 0.05, above 0 and at most 100%, got {value!r}")
    return share


def _difference(tensor: TensorCheck) -> tuple[bool, int, float]:
    return not tensor.ok, tensor.differing, tensor.max_abs or 0.0


def _print_worst(tensors: list[TensorCheck]) -> None:
    worst = sorted((tensor for tensor in tensors if tensor.differing), key=_difference, reverse=True)[:_WORST]
    if not worst:
        return
    columns = ("tensor", "dtype", "must be", "entries", "differ", "wrong", "max abs", "max ulp", "rel. norm")
    rows = [
        (
            tensor.name,
            tensor.dtype,
            "equal" if tensor.criterion == "bits" else "close",
            f"{tensor.entries:,}",
            f"{tensor.differing:,}",
            f"{tensor.wrong:,}",
            number(tensor.max_abs),
            number(tensor.max_ulp),
            number(tensor.relative_norm),
        )
        for tensor in worst
    ]
    print_table(columns, rows, left=3)


def _print(report: VerifyReport) -> None:
    for check in report.checks:
        shown = [f"{check.status}: {problem}" for problem in check.problems[:_SHOWN]] or [f"{check.status}: {check.detail}"]
        if len(check.problems) > _SHOWN:
            shown.append(f"and {len(check.problems) - _SHOWN} more")
        for line in shown:
            click.echo(f"{check.name:<8} {line}")
    _print_worst(report.tensors)
    for note in report.notes:
        click.echo(f"note: {note}")
    chosen = "" if report.sample_seed is None else f" (chosen by seed {report.sample_seed})"
    click.echo(
        f"computed {report.verified_tensors} of {report.of_tensors} tensors again{chosen}, "
        f"{size(report.verified_bytes)} of {size(report.of_bytes)}, in {report.seconds:.1f} s"
    )
    click.echo(f"{report.output}: {'verified' if report.ok else 'NOT what its recipe says'}")


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--sample", callback=_share, metavar="SHARE", help="Share of the bytes to compute again: 5% (default) or 0.05.")
@click.option("--all", "everything", is_flag=True, help="Compute every tensor again.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the choice of the sample.")
@click.option("--tensor", metavar="PATTERN", help="Only tensors whose name matches a glob such as '*.mlp.*'; all of them without --sample.")
@click.option("--digests/--no-digests", default=True, show_default=True, help="Read the output's files whole and compare their digests.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing; the exit status tells.")
@click.option("--debug", is_flag=True, help="Show a traceback for errors.")
def verify(
    out: Path,
    sample: float | None,
    everything: bool,
    seed: int,
    tensor: str | None,
    digests: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Check OUT, the output of taskloom merge: its files, and tensors computed again from its recipe with the plain-torch reference.

    The exit status is 0 where everything is as it must be, 1 where something differs or cannot be verified, 2 for a wrong command line.
    """
    if everything and sample is not None:
        raise click.UsageError("--all and --sample exclude each other")
    from taskloom.merge.verify import verify_merge

    share = 1.0 if everything or (tensor is not None and sample is None) else sample or 0.05
    with reported(debug):
        with progress_bar(shown=not (quiet or as_json)) as progress:
            report = verify_merge(out, sample=share, seed=seed, tensor=tensor, digests=digests, progress=progress)
        if as_json:
            print_json(report.to_dict())
        elif not quiet:
            _print(report)
    if not report.ok:
        raise SystemExit(1)

"""``taskloom methods`` lists the published methods of the library; ``taskloom run`` shows a method's claim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from taskloom.cli.errors import stoppable
from taskloom.cli.tables import number, print_json, print_table, progress_bar
from taskloom.methods.catalogue import METHODS, Method, MethodError, find_method
from taskloom.methods.result import MethodResult, last_result

_RUNS = "runs"
_STEPS = 1000


def _facts(method: Method, runs: Path) -> dict[str, Any]:
    found = last_result(method, runs)
    last = None
    if found is not None:
        result, origin = found
        last = {"verdict": result.verdict, "held": result.held, "origin": origin, "device": result.device, "seeds": len(result.seeds)}
    names = ("name", "title", "paper", "family", "wing", "claim")
    return {**{name: getattr(method, name) for name in names}, "last_result": last}


@click.command()
@click.option("--runs", type=click.Path(path_type=Path), default=_RUNS, show_default=True, help="Folder of earlier runs.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def methods(runs: Path, as_json: bool) -> None:
    """List the methods: what each is, the paper, its family of kernels, its claim, and the last result.

    The last result is that of `taskloom run` in this folder, or else the one that came with this version.
    """
    try:
        rows = [_facts(method, runs) for _, method in sorted(METHODS.items())]
    except MethodError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        print_json(rows)
        return
    lasts = ["never run" if (last := row["last_result"]) is None else f"{last['verdict']} ({last['origin']})" for row in rows]
    table = [(row["name"], row["family"], row["title"], last, row["claim"]) for row, last in zip(rows, lasts, strict=True)]
    print_table(("method", "family", "title", "last result", "claim"), table, left=5)


def _print_result(result: MethodResult, out: Path) -> None:
    for claim in result.claims:
        click.echo(f"\n{claim.name}: {claim.statement}")
        columns = ("arm", "mean", *(f"seed {seed}" for seed in result.seeds))
        rows = [
            (f"{arm} (baseline)" if arm in claim.baselines else arm, number(claim.means[arm]), *map(number, values))
            for arm, values in claim.values.items()
        ]
        click.echo(claim.metric)
        print_table(columns, rows)
        for inequality in claim.inequalities:
            click.echo(f"{'holds' if inequality.held else 'DOES NOT HOLD'}, {inequality.over}: {inequality.text}")
        if claim.note:
            click.echo(claim.note)
    click.echo(f"\n{result.title}: {result.verdict}; {result.seconds:.1f} s; {out}")


@click.command()
@click.argument("method")
@click.option("--seeds", type=click.IntRange(1, 1000), help="Runs of each experiment.  [default: 3; 1 with --quick]")
@click.option("--quick", is_flag=True, help="A small run of a few seconds, which says nothing of the claim.")
@click.option("--device", default="cpu", show_default=True, help="A torch device.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help=f"Folder of result.json and result.png; {_RUNS}/METHOD.")
@click.option("--no-plot", is_flag=True, help="Write no plot, which needs matplotlib.")
@click.option("--check", is_flag=True, help="Exit with status 1 where the claim does not hold.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--debug", is_flag=True, help="Show a traceback for errors.")
def run(
    method: str, seeds: int | None, quick: bool, device: str, out: Path | None, no_plot: bool, check: bool, as_json: bool, debug: bool
) -> None:
    """Show the claim of METHOD: its small experiment on each seed, beside the paper's baselines.

    A claim that does not hold at this size is reported as such, with its numbers.
    """
    try:
        found = find_method(method)
        folder = out or Path(_RUNS) / found.name
        with stoppable(), progress_bar(shown=not as_json) as bar:
            from taskloom.methods.run import run_method

            def show(stage: str, share: float) -> None:
                if bar is not None:
                    bar(stage, int(share * _STEPS), _STEPS)

            result = run_method(
                found, seeds=seeds or (1 if quick else 3), quick=quick, device=device, out=folder, plot=not no_plot, show=show
            )
    except (MethodError, OSError) as error:
        if debug:
            raise
        raise click.ClickException(str(error)) from error
    if as_json:
        print_json(result.to_dict())
    else:
        _print_result(result, folder)
    if check and not result.held:
        raise SystemExit(1)

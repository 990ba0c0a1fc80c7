"""``taskloom inspect``: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from taskloom.cli.errors import reported
from taskloom.cli.tables import number, print_json, print_table, progress_bar, shape, size

if TYPE_CHECKING:
    from taskloom.merge.inspection import GroupTotals, Inspection, TensorSummary


def _row(tensor: TensorSummary, stats: bool, hashes: bool) -> list[str]:
    row = [tensor.name, tensor.dtype, shape(tensor.shape), size(tensor.bytes)]
    if stats:
        figures = tensor.statistics
        if figures is None:
            row += ["-"] * 6
        else:
            row += [number(value) for value in (figures.norm, figures.mean, figures.minimum, figures.maximum)]
            row += [f"{figures.zero_share:.2%}", f"{figures.nonfinite:,}"]
    return [*row, tensor.sha256 or "-"] if hashes else row


def _print_groups(title: str, groups: Mapping[str, GroupTotals]) -> None:
    rows = [(name, f"{group.tensors:,}", f"{group.parameters:,}", size(group.bytes)) for name, group in groups.items()]
    click.echo()
    print_table((title, "tensors", "parameters", "size"), rows)


def _made_by(merge: Mapping[str, Any]) -> str:
    models = ", ".join(map(str, merge["models"] or ()))
    base = f" into {merge['base_model']}" if merge["base_model"] else ""
    return f"{merge['method']} of {models}{base}, seed {merge['seed']}"


def _print(found: Inspection, stats: bool, hashes: bool) -> None:
    columns = ["tensor", "dtype", "shape", "size"]
    columns += ["norm", "mean", "min", "max", "zeros", "NaN, inf"] if stats else []
    columns += ["sha256"] if hashes else []
    print_table(columns, [_row(tensor, stats, hashes) for tensor in found.tensors], left=3)
    _print_groups("dtype", found.by_dtype)
    if len(found.by_layer) > 1:
        _print_groups("layer", found.by_layer)
    click.echo()
    for file in found.files:
        click.echo(f"file      {file.name}  {size(file.bytes)}, {file.tensors} tensors" + (f"  sha256 {file.sha256}" if hashes else ""))
        for key, value in file.metadata.items():
            click.echo(f"  {key}: {value}")
    if found.config:
        click.echo("config    " + ", ".join(f"{key} {value}" for key, value in found.config.items()))
    if found.merge is not None:
        click.echo(f"merge     {_made_by(found.merge)}")
    click.echo(f"total     {len(found.tensors)} tensors, {found.parameters:,} parameters, {size(found.bytes)}")


@click.command()
@click.argument("path")
@click.option("--tensor", metavar="PATTERN", help="Only tensors whose name matches a glob such as '*.mlp.*'.")
@click.option("--stats", is_flag=True, help="Read the weights: norm, mean, range, share of zeros, NaN and infinities of each tensor.")
@click.option("--hash", "hashes", is_flag=True, help="Read the weights: sha256 of each tensor's bytes and of each file.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option("--debug", is_flag=True, help="Show a traceback for errors.")
def inspect(path: str, tensor: str | None, stats: bool, hashes: bool, as_json: bool, debug: bool) -> None:
    """Show what the checkpoint PATH holds: a folder, a .safetensors file or a hub id. Only headers are read unless asked for more."""
    from taskloom.merge.inspection import inspect_checkpoint

    with reported(debug):
        with progress_bar(shown=(stats or hashes) and not as_json) as progress:
            found = inspect_checkpoint(path, stats=stats, hashes=hashes, tensor=tensor, progress=progress)
        if as_json:
            print_json(found.to_dict())
        else:
            _print(found, stats, hashes)

"""``taskloom merge``: merge safetensors checkpoints by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from taskloom.cli.errors import reported, stoppable
from taskloom.cli.mergekit_flags import refuse_mergekit_flags
from taskloom.cli.tables import byte_bar, print_json, size

if TYPE_CHECKING:
    from taskloom.merge.preview import Preview
    from taskloom.merge.report import MergeReport


def _shown_default(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _list_methods(as_json: bool) -> None:
    from taskloom.merge.stages import METHODS, REQUIRED

    if as_json:
        print_json(
            [
                {
                    "name": method.name,
                    "title": method.title,
                    "source": method.source,
                    "stages": method.stages,
                    "base_model": method.base == "required",
                    "parameters": [
                        {
                            "name": parameter.name,
                            "default": None if parameter.default is REQUIRED else parameter.default,
                            "required": parameter.default is REQUIRED,
                            "per_model": parameter.per_model,
                            "choices": list(parameter.choices),
                            "has_effect": not parameter.inert,
                            "help": parameter.help,
                        }
                        for parameter in method.parameters
                    ],
                }
                for method in METHODS.values()
            ]
        )
        return
    width = max(len(name) for name in METHODS) + 2
    for method in METHODS.values():
        parameters = ", ".join(
            f"{parameter.name}={_shown_default(parameter.default)}" for parameter in method.parameters if not parameter.inert
        )
        click.echo(f"{method.name:<{width}}{method.stages}")
        click.echo(f"{'':<{width}}{parameters}")


def _print_template(name: str) -> None:
    from taskloom.merge.recipe import find_method
    from taskloom.merge.templates import recipe_template

    click.echo(recipe_template(find_method(name)), nl=False)


def _device_row(preview: Preview) -> str:
    if preview.largest_tensor is None:
        return f"{preview.device}: nothing is computed, so none of its memory is taken"
    return (
        f"{preview.device}: at most {size(preview.device_memory or 0)} of its memory; --max-vram can be "
        f"{size(preview.least_max_vram or 0)}, for {preview.largest_tensor}"
    )


def _print_preview(preview: Preview) -> None:
    rows = {
        "method": preview.method,
        "base": preview.base_model or "-",
        "models": ", ".join(preview.models),
        "tensors": f"{preview.tensors_merged} merged ({preview.parameters_merged:,} parameters), {preview.tensors_copied} copied",
        "read": size(preview.bytes_in),
        "write": f"{size(preview.bytes_out)} in {len(preview.files)} file{'s' if len(preview.files) > 1 else ''}",
    }
    if preview.device is None:
        rows["memory"] = (
            f"at most {size(preview.anonymous_memory)} (besides the mapped files); --max-ram can be {size(preview.least_max_ram)}"
        )
    else:
        rows["device"] = _device_row(preview)
        rows["memory"] = f"{size(preview.pinned_memory or 0)} of the host's memory in pinned buffers, besides what torch takes"
    for label, value in rows.items():
        click.echo(f"{label:<9}{value}")
    for name, count in preview.files.items():
        click.echo(f"  {name}  {size(count)}")
    for note in preview.notes:
        click.echo(f"note: {note}")


def _print_summary(report: MergeReport, *, page: bool) -> None:
    merged = sum(tensor.figures is not None for tensor in report.tensors)
    click.echo(
        f"merged {merged} of {len(report.tensors)} tensors in {report.seconds:.1f} s "
        f"({size(report.bytes_read)} read, {size(report.bytes_written)} written)"
    )
    for model, density in zip(report.models, report.total.kept_density, strict=False):
        click.echo(f"  kept {density:7.2%} of {model}")
    if len(report.models) > 1:
        click.echo(f"  sign conflicts in {report.total.conflict_rate:.2%} of entries")
    for note in report.notes:
        click.echo(f"note: {note}")
    click.echo(f"report: {Path(report.output) / 'merge_report.json'}")
    if page:
        click.echo(f"page: {Path(report.output) / 'merge_report.html'}")


def _required(value: Path | None, name: str) -> Path:
    if value is None:
        raise click.UsageError(f"missing argument {name}", click.get_current_context())
    return value


def _merge(recipe: Path, out: Path | None, options: dict[str, Any]) -> None:
    from taskloom.merge.output import check_output
    from taskloom.merge.run import prepare, run_plan

    loaded, planned = prepare(recipe, seed=options["seed"], shard_size=options["shard_size"], allow_nonfinite=options["allow_nonfinite"])
    if options["dry_run"]:
        from taskloom.merge.preview import preview

        if out is not None:
            check_output(out, planned.cast.models, overwrite=options["overwrite"], resume=options["resume"])
        shown = preview(
            planned,
            method=loaded.method.name,
            base_model=loaded.base_model,
            threads=options["threads"],
            max_ram=options["max_ram"],
            device=options["device"],
            max_vram=options["max_vram"],
            plot=options["plot"],
        )
        if options["as_json"]:
            print_json(shown.to_dict())
        else:
            _print_preview(shown)
        return
    with byte_bar("merging", planned.progress_total, shown=not options["quiet"]) as progress:
        report = run_plan(
            loaded,
            planned,
            _required(out, "OUT"),
            threads=options["threads"],
            max_ram=options["max_ram"],
            device=options["device"],
            max_vram=options["max_vram"],
            plot=options["plot"],
            report=options["page"],
            copy_tokenizer=options["copy_tokenizer"],
            write_card=options["write_card"],
            overwrite=options["overwrite"],
            resume=options["resume"],
            progress=progress,
        )
    if options["as_json"]:
        print_json(report.to_dict())
    elif not options["quiet"]:
        _print_summary(report, page=options["page"])


@click.command(
    epilog="mergekit's names are understood too: --out-shard-size, --num-threads (-j), --random-seed, --write-model-card.",
)
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option("--list-methods", is_flag=True, help="List the merge methods with their stages and parameters (also with --json).")
@click.option("--init", metavar="METHOD", help="Print a commented recipe for METHOD.")
@click.option("--dry-run", is_flag=True, help="Show the plan, reading only headers and writing nothing (also with --json).")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option(
    "--shard-size", "--out-shard-size", default="5GB", show_default=True, metavar="SIZE", help="Most bytes per file: 5GB, 500M, 1GiB."
)
@click.option(
    "--threads", "--num-threads", "-j", type=click.IntRange(min=0), default=0, help="Threads of the merge; 0 (default) uses all cores."
)
@click.option("--max-ram", metavar="SIZE", help="Most anonymous memory of the process: 256MB, 1GiB. Too little is refused before any work.")
@click.option("--device", metavar="NAME", help="Merge on a GPU: cuda or cuda:N; default: cpu.")
@click.option(
    "--max-vram", metavar="SIZE", help="With --device: most of the GPU's memory that torch may take; default: 80% of what is free."
)
@click.option("--seed", "--random-seed", type=click.IntRange(0, 2**64 - 1), help="Seed of random masks; default: the recipe's, else 0.")
@click.option("--plot", is_flag=True, help="Write figures into OUT/plots (needs matplotlib).")
@click.option("--report", "page", is_flag=True, help="Write the report as a page for a browser, OUT/merge_report.html.")
@click.option("--copy-tokenizer/--no-copy-tokenizer", default=True, show_default=True, help="Copy the base's tokenizer files.")
@click.option(
    "--write-card/--no-write-card", "--write-model-card/--no-write-model-card", default=True, show_default=True, help="Write README.md."
)
@click.option("--resume", is_flag=True, help="Go on with what the same merge left when it was cut off; start afresh where nothing is left.")
@click.option("--overwrite", is_flag=True, help="Replace an existing OUT, once the merge is complete; discard what a cut-off merge left.")
@click.option("--allow-nonfinite", is_flag=True, help="Let NaN and infinities in the models pass instead of stopping.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bar and no summary.")
@click.option("--debug", is_flag=True, help="Show a traceback for errors.")
@refuse_mergekit_flags
def merge(recipe: Path | None, out: Path | None, list_methods: bool, init: str | None, debug: bool, **options: Any) -> None:
    """Merge the safetensors checkpoints named in RECIPE (a YAML file, as for mergekit) into the new folder OUT."""
    with stoppable(), reported(debug):
        if list_methods:
            _list_methods(options["as_json"])
        elif init is not None:
            _print_template(init)
        else:
            found = _required(recipe, "RECIPE")
            if not options["dry_run"]:
                _required(out, "OUT")
            _merge(found, out, options)

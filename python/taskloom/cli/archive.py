"""``taskloom compress`` and ``taskloom extract``: fine-tunings of one base as a TALL-mask archive, and a task back out of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from taskloom.cli.errors import reported, stoppable
from taskloom.cli.tables import byte_bar, print_json, size

if TYPE_CHECKING:
    from taskloom.archive.extract import ExtractReport
    from taskloom.archive.opened import OpenedArchive
    from taskloom.archive.report import CompressReport


def _print_compressed(report: CompressReport) -> None:
    sizes = report.sizes
    if report.preview:
        click.echo(f"would compress {len(report.tasks)} tasks of {report.base_model} ({report.parameters:,} parameters each)")
    else:
        speed = size((report.bytes_read + report.bytes_written) / report.seconds) if report.seconds else "-"
        click.echo(f"compressed {len(report.tasks)} tasks of {report.base_model} in {report.seconds:.1f} s ({speed}/s read and written)")
    click.echo(f"  archive     {size(sizes.archive)} (base {size(sizes.base)}, vector {size(sizes.vector)}, masks {size(sizes.masks)})")
    click.echo(f"  separate    {size(sizes.separate)} in {len(report.tasks)} checkpoints: the archive takes {sizes.ratio:.1%} of that")
    share = sizes.archive / sizes.separate_and_base
    click.echo(f"  and base    {size(sizes.separate_and_base)} with the base: {share:.1%}")
    for task in report.tasks:
        line = f"  {task.task}: {size(task.bytes)}, tall_mask_lambda {task.tall_mask_lambda:g}"
        if not report.preview:
            density = "-" if task.mask_density is None else f"{task.mask_density:.2%}"
            error = "equals the base" if task.relative_error is None else f"relative error {task.relative_error:.4f}"
            line += f", mask density {density}, {error}"
        click.echo(line)
    for note in report.notes:
        click.echo(f"note: {note}")
    if report.output and not report.preview:
        click.echo(f"report: {Path(report.output) / 'compress_report.json'}")


def _compress(recipe: Path, out: Path | None, options: dict[str, Any]) -> None:
    from taskloom.archive.planned import plan_archive
    from taskloom.archive.report import build_report
    from taskloom.merge.output import check_output

    planned = plan_archive(recipe, shard_size=options["shard_size"])
    if options["dry_run"]:
        target = check_output(out, planned.cast.models, overwrite=options["overwrite"]) if out is not None else None
        report = build_report(planned, target)
    else:
        assert out is not None
        from taskloom.archive.compress import run_compression

        with byte_bar("compressing", planned.progress_total, shown=not options["quiet"]) as progress:
            report = run_compression(
                planned,
                out,
                threads=options["threads"],
                copy_tokenizer=options["copy_tokenizer"],
                overwrite=options["overwrite"],
                progress=progress,
            )
    if options["as_json"]:
        print_json(report.to_dict())
    elif not options["quiet"]:
        _print_compressed(report)


_SHARD_SIZE = click.option("--shard-size", default="5GB", show_default=True, metavar="SIZE", help="Most bytes per file: 5GB, 500M, 1GiB.")
_THREADS = click.option("--threads", "-j", type=click.IntRange(min=0), default=0, help="Threads; 0 (default) uses all cores.")
_TOKENIZER = click.option("--copy-tokenizer/--no-copy-tokenizer", default=True, show_default=True, help="Copy the tokenizer files.")
_OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace an existing OUT, once the new one is complete.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_QUIET = click.option("--quiet", "-q", is_flag=True, help="No progress bar and no summary.")
_DEBUG = click.option("--debug", is_flag=True, help="Show a traceback for errors.")


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path), required=False)
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option("--init", is_flag=True, help="Print a commented recipe.")
@click.option(
    "--dry-run", is_flag=True, help="Show the sizes before and after, reading only headers and writing nothing (also with --json)."
)
@_JSON
@_SHARD_SIZE
@_THREADS
@_TOKENIZER
@_OVERWRITE
@_QUIET
@_DEBUG
def compress(recipe: Path | None, out: Path | None, init: bool, debug: bool, **options: Any) -> None:
    """Compress the fine-tunings named in RECIPE into OUT: their base, one shared vector, and one bit per parameter and task."""
    if init:
        from taskloom.archive.recipe import compress_template

        click.echo(compress_template(), nl=False)
        return
    if recipe is None:
        raise click.UsageError("missing argument RECIPE", click.get_current_context())
    if out is None and not options["dry_run"]:
        raise click.UsageError("missing argument OUT", click.get_current_context())
    with stoppable(), reported(debug):
        _compress(recipe, out, options)


def _print_tasks(archive: OpenedArchive, as_json: bool) -> None:
    from dataclasses import asdict

    info = archive.info
    if as_json:
        content = asdict(info)
        print_json({"archive": str(archive.path), "bytes": archive.nbytes, **content})
        return
    click.echo(f"{archive.path}: {len(info.tasks)} tasks of {info.base_model}, {info.parameters:,} parameters, {size(archive.nbytes)}")
    width = max(len(task.name) for task in info.tasks) + 2
    for task in info.tasks:
        click.echo(f"  {task.name:<{width}}tall_mask_lambda {task.tall_mask_lambda:g}, from {task.model}")


def _print_extracted(report: ExtractReport) -> None:
    speed = size((report.bytes_read + report.bytes_written) / report.seconds) if report.seconds else "-"
    click.echo(
        f"restored task {report.task} in {report.seconds:.1f} s ({report.tensors} tensors, {report.copied} copied from the base, {speed}/s)"
    )
    for note in report.notes:
        click.echo(f"note: {note}")
    click.echo(f"checkpoint: {report.output}")


def _extract(archive: Path, task: str, out: Path | None, options: dict[str, Any]) -> None:
    from taskloom.archive.extract import plan_extraction, run_extraction

    planned = plan_extraction(str(archive), task, shard_size=options["shard_size"])
    with byte_bar("restoring", planned.progress_total, shown=not options["quiet"]) as progress:
        report = run_extraction(
            planned,
            out,
            threads=options["threads"],
            copy_tokenizer=options["copy_tokenizer"],
            overwrite=options["overwrite"],
            progress=progress,
        )
    if options["as_json"]:
        print_json(report.to_dict())
    elif not options["quiet"]:
        _print_extracted(report)


@click.command()
@click.argument("archive", type=click.Path(path_type=Path))
@click.argument("task", required=False)
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option("--list", "list_tasks", is_flag=True, help="List the archive's tasks (also with --json).")
@_JSON
@_SHARD_SIZE
@_THREADS
@_TOKENIZER
@_OVERWRITE
@_QUIET
@_DEBUG
def extract(archive: Path, task: str | None, out: Path | None, list_tasks: bool, debug: bool, **options: Any) -> None:
    """Restore the checkpoint of TASK from ARCHIVE, which taskloom compress wrote, into the new folder OUT (default: ARCHIVE-TASK)."""
    if task is None and not list_tasks:
        raise click.UsageError("missing argument TASK; --list shows the archive's tasks", click.get_current_context())
    with stoppable(), reported(debug):
        if list_tasks:
            from taskloom.archive.opened import open_archive

            _print_tasks(open_archive(str(archive)), options["as_json"])
        else:
            assert task is not None
            _extract(archive, task, out, options)

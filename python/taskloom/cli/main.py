"""The ``taskloom`` command: a table of sub-commands that are imported when they are called."""

from __future__ import annotations

import importlib

import click

_COMMANDS = {
    "compress": ("taskloom.cli.archive:compress", "Compress fine-tunings of one base into an archive of masks."),
    "demo": ("taskloom.cli.demo:demo", "Merge small models made on the spot, and show how well each method works."),
    "diff": ("taskloom.cli.diff:diff", "Compare two checkpoints, tensor by tensor."),
    "doctor": ("taskloom.cli.doctor:doctor", "Show what was built, what this machine offers, and what would run."),
    "extract": ("taskloom.cli.archive:extract", "Restore one fine-tuning from such an archive."),
    "inspect": ("taskloom.cli.inspect:inspect", "Show what a checkpoint holds."),
    "merge": ("taskloom.cli.merge:merge", "Merge safetensors checkpoints by a recipe."),
    "methods": ("taskloom.cli.methods:methods", "List the published methods, their claims and last results."),
    "report": ("taskloom.cli.report:report", "Make the page of a merge's report for a browser."),
    "run": ("taskloom.cli.methods:run", "Show the claim of a published method in a small experiment."),
    "verify": ("taskloom.cli.verify:verify", "Check a finished merge, with tensors computed again by the reference."),
}


class LazyGroup(click.Group):
    """A group whose help costs no import of its sub-commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[cmd_name][0].split(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            from taskloom.merge.errors import near_miss

            ctx.fail(f"unknown command {args[0]!r}{near_miss(args[0], _COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name][1]) for name in self.list_commands(ctx)])


def _print_version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("taskloom")
    except PackageNotFoundError:
        found = "unknown (not installed)"
    click.echo(f"taskloom {found}")
    ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version and exit.")
def taskloom() -> None:
    """Task-specific weights: merge checkpoints, and look at what the kernels can do here."""


def main() -> None:
    """Entry point of the ``taskloom`` command."""
    taskloom(prog_name="taskloom")

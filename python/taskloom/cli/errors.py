"""Turns what a command cannot go on from into one line, at the outermost place."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import click

from taskloom.cli.signals import signal_of, stopping_signals, with_notes
from taskloom.merge.errors import MergeError


def _message(error: Exception) -> str:
    if isinstance(error, MergeError):
        return str(error)
    return "out of memory" if isinstance(error, MemoryError) else f"{type(error).__name__}: {error}"


@contextmanager
def reported(debug: bool, failure: type[click.ClickException] = click.ClickException) -> Iterator[None]:
    """Within the block a failed merge, a failure of the operating system and a lack of memory become an error message.

    Parameters
    ----------
    debug
        Let the exception itself through, for its traceback.
    failure
        What to raise; it decides the exit status.
    """
    try:
        yield
    except (MergeError, OSError, MemoryError) as error:
        # A reader that has had enough, such as head, is no failure.
        if debug or (isinstance(error, OSError) and error.errno == errno.EPIPE):
            raise
        raise failure(with_notes(_message(error), error)) from error


@contextmanager
def stoppable() -> Iterator[None]:
    """Within the block SIGINT, SIGTERM and SIGHUP end the command with a message that names them, and 128 plus their number."""
    try:
        with stopping_signals():
            yield
    except KeyboardInterrupt as error:
        stop = signal_of(error)
        click.echo(f"Error: {with_notes(f'stopped by {stop.name}', error)}", err=True)
        click.get_current_context().exit(128 + stop)

"""Signals that end a command: they become exceptions, so that it can put its things in order and say what it leaves behind."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _StoppedError(KeyboardInterrupt):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


def _stop(number: int, _frame: FrameType | None) -> None:
    raise _StoppedError(number)


@contextmanager
def stopping_signals() -> Iterator[None]:
    """Within the block SIGINT, SIGTERM and SIGHUP raise a KeyboardInterrupt; one that is ignored (nohup) stays ignored."""
    before = {number: signal.getsignal(number) for number in _STOPPING}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def signal_of(error: KeyboardInterrupt) -> signal.Signals:
    """The signal that a KeyboardInterrupt stands for."""
    return error.signal if isinstance(error, _StoppedError) else signal.SIGINT


def with_notes(message: str, error: BaseException) -> str:
    """A message with the notes of its exception."""
    return "\n".join([message, *getattr(error, "__notes__", ())])

"""Runs the parts of a check one after the other, each within its own budget and all within one deadline."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LEAST_SECONDS = 5.0
_GRACE_SECONDS = 5.0
_POLL_SECONDS = 0.1


class Clock:
    """What is left of the time that the whole check may take."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())


@dataclass(frozen=True)
class Ended:
    """How a command ended: its status (None: it was stopped at its limit), what it printed, and how long it took."""

    status: int | None
    output: str
    seconds: float


def run(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None, folder: Path | None = None) -> Ended:
    """Run a command with all its children, and stop them all where it takes longer than ``seconds``."""
    begin = time.monotonic()
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, cwd=folder, start_new_session=True
        )
    except OSError as error:
        return Ended(127, f"{command[0]}: {error.strerror}\n", 0.0)
    try:
        output, _ = process.communicate(timeout=max(seconds, 0.1))
        status: int | None = process.returncode
    except subprocess.TimeoutExpired:
        output, status = _stop(process), None
    return Ended(status, output.decode(errors="replace"), time.monotonic() - begin)


def _stop(process: subprocess.Popen[bytes]) -> bytes:
    """End a process and its children: it is asked first, as from a terminal, so that pytest still sums up; then all are killed."""
    grace = Clock(_GRACE_SECONDS)
    process.send_signal(signal.SIGINT)
    while process.poll() is None and grace.left() > 0:
        try:
            return process.communicate(timeout=_POLL_SECONDS)[0]
        except subprocess.TimeoutExpired:
            continue
    # Children may outlive the process, and hold its output open.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0]


@dataclass(frozen=True)
class Section:
    """A part of the check: its name, the most seconds that it may take, and what it does within the seconds that it gets."""

    name: str
    budget: float
    work: Callable[[float], str]


@dataclass(frozen=True)
class Outcome:
    """How a section ended: ``passed``, ``failed``, ``refused``, ``cut off`` or ``not started``, and in a line why."""

    section: str
    status: str
    seconds: float


STATUSES = ("passed", "failed", "refused", "cut off")


def run_sections(sections: Sequence[Section], clock: Clock, ended: Callable[[Outcome], None]) -> None:
    """Run sections in order, telling ``ended`` of each at once; one that finds no time left is not started."""
    for section in sections:
        seconds = min(section.budget, clock.left())
        if seconds < min(LEAST_SECONDS, section.budget):
            ended(Outcome(section.name, "not started", 0.0))
            continue
        begin = time.monotonic()
        status = section.work(seconds)
        if status not in STATUSES:
            raise ValueError(f"section {section.name}: expected one of {', '.join(STATUSES)}, got {status!r}")
        ended(Outcome(section.name, status, time.monotonic() - begin))

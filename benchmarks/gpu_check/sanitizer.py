"""Runs compute-sanitizer over the smoke set and reads what it says; a tool that the device refuses has passed nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sections import Ended, run

TOOLS = ("memcheck", "racecheck", "initcheck")
OPTIONS = {"memcheck": ("--padding", "2048"), "racecheck": (), "initcheck": ()}
_REFUSED = re.compile(
    r"device not supported|not supported on this|unable to find|failed to initialize|initialization (error|failed)|error 999|"
    r"permission|operation not permitted|insufficient privileges|debugger.*(attach|already)",
    re.IGNORECASE,
)
_SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards?)")


@dataclass(frozen=True)
class Verdict:
    """What one tool found: ``passed``, ``failed``, ``refused`` or ``cut off``, and a line that says why."""

    tool: str
    status: str
    reason: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _first_line(output: str, pattern: re.Pattern[str]) -> str:
    return next((line.strip(" =") for line in output.splitlines() if pattern.search(line)), "")


def verdict(tool: str, ended: Ended) -> Verdict:
    """Read one run. It passed only where the tool itself counted no errors and the program under it ended well."""
    if ended.status is None:
        return Verdict(tool, "cut off", f"stopped after {ended.seconds:.0f} s", ended.seconds)
    summary = _SUMMARY.search(ended.output)
    found = int(next(group for group in summary.groups() if group is not None)) if summary else None
    refusal = _first_line(ended.output, _REFUSED)
    if found is None or (refusal and ended.status != 0):
        reason = refusal or (ended.output.strip().splitlines() or ["it printed nothing"])[-1]
        return Verdict(tool, "refused", f"no summary of errors: {reason}" if found is None else reason, ended.seconds)
    if found or ended.status != 0:
        counted = f"{found} errors" if found else f"no errors, but the program ended with status {ended.status}"
        return Verdict(tool, "failed", counted, ended.seconds)
    return Verdict(tool, "passed", "0 errors", ended.seconds)


def check(
    sanitizer: str, program: Mapping[str, Sequence[str]], seconds: float, environment: Mapping[str, str], folder: Path
) -> list[tuple[Verdict, str]]:
    """Each tool in turn, with what it printed. ``program`` gives the command for a tool: racecheck and initcheck take a smaller set."""
    found = []
    left = seconds
    for place, tool in enumerate(TOOLS):
        # The later tools are the slower ones, and take what is left.
        share = left / 2 if place == 0 else left / (len(TOOLS) - place)
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *OPTIONS[tool], *program[tool]]
        ended = run(command, share, environment, folder)
        left = max(0.0, left - ended.seconds)
        found.append((verdict(tool, ended), ended.output))
    return found


def overall(verdicts: Sequence[Verdict]) -> str:
    """The section's status: the worst of its tools'."""
    statuses = {one.status for one in verdicts}
    return next(status for status in ("failed", "refused", "cut off", "passed") if status in statuses)

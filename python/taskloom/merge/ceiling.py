"""How much anonymous memory a planned merge takes, and how to stay below a ceiling.

Inputs are mapped from their files and outputs are written in place; what is counted here is the rest: what the process holds already, the
report, and the buffers of the compiled executor, which sizes them itself (``csrc/merge/memory_account.cpp``).
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskloom.merge.errors import MergeError
from taskloom.merge.execute import thread_count
from taskloom.merge.header import BITS
from taskloom.merge.plan import MergePlan

_MB = 10**6

# What is imported and opened after a plan is made: the progress bar, the journal, the digests' buffer and their thread with its stack.
_LATER = 10 * 2**20
# From one run to the next the interpreter's own memory differs by less than this.
_VARIATION = 2 * 2**20
# matplotlib with numpy, and its figures.
_PLOTS = 192 * 2**20
# A finished tensor in the results, the journal and the report: Python objects of its own, for each model, and for each pair of models.
_TENSOR_BYTES = 6144
_MODEL_BYTES = 768
_PAIR_BYTES = 176
# With plots, the counts of a model's magnitudes by exponent.
_HISTOGRAM_BYTES = 256 * 48

# Below this much room thresholds take more passes than they need to: fewer threads are better.
_COMFORTABLE_ROOM = 8 * 2**20


@dataclass(frozen=True)
class MemoryBudget:
    """What a merge may take, and what it will.

    Attributes
    ----------
    threads
        Threads of the merge.
    room
        Bytes that the executor keeps between its passes over a tensor, at most.
    needed
        Most bytes of anonymous memory of the whole process with these.
    least
        The lowest ceiling that would do.
    notes
        For the report: what the ceiling changed.
    """

    threads: int
    room: int
    needed: int
    least: int
    notes: tuple[str, ...] = ()


def process_memory() -> int:
    """Bytes of private writable memory of this process, touched or not (Linux: ``VmData``, which ``RLIMIT_DATA`` limits); else its peak."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return 1024 * max(int(fields[name].split()[0]) for name in ("VmData", "RssAnon") if name in fields)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _results_bytes(plan: MergePlan, plot: bool) -> int:
    models = len(plan.models)
    each = _TENSOR_BYTES + models * _MODEL_BYTES + models**2 * _PAIR_BYTES + (models * _HISTOGRAM_BYTES if plot else 0)
    return len(plan.jobs) * each


class _Account:
    def __init__(self, plan: MergePlan, plot: bool) -> None:
        # Imported before the process's memory is looked at, so that they are part of it.
        for module in ("taskloom._native", "taskloom.merge.working", "taskloom.merge.report", "xxhash"):
            importlib.import_module(module)
        native: Any = importlib.import_module("taskloom._native")
        self._fixed = process_memory() + _LATER + _results_bytes(plan, plot) + (_PLOTS if plot else 0)
        self._native = native.MemoryAccount(plan, BITS, plot)
        self.default_room: int = native.default_room

    def least_room(self, threads: int) -> int:
        room: int = self._native.least_room(threads)
        return room

    def needed(self, threads: int, room: int) -> int:
        compiled: int = self._native.needed(threads, room)
        return self._fixed + compiled

    def largest_room(self, threads: int, limit: int, least: int) -> int | None:
        """The most room up to the default with which so many threads stay within ``limit``; None where ``least`` is too much."""
        if self.needed(threads, least) > limit:
            return None
        low, high = least, max(least, self.default_room)
        if self.needed(threads, high) <= limit:
            return high
        while high - low > 2**16:
            middle = (low + high) // 2
            if self.needed(threads, middle) <= limit:
                low = middle
            else:
                high = middle
        return low


def megabytes(count: int) -> str:
    """A number of bytes in whole megabytes, rounded up, as :func:`taskloom.merge.shards.parse_size` reads it."""
    return f"{-(-count // _MB)}MB"


def choose_budget(plan: MergePlan, *, threads: int = 0, max_ram: int | None = None, plot: bool = False) -> MemoryBudget:
    """Choose threads and buffers so that a merge's anonymous memory stays within a ceiling.

    Parameters
    ----------
    plan
        The whole merge, its headers being in memory.
    threads
        Threads that were asked for; 0 means all cores. Fewer are taken where their buffers do not fit.
    max_ram
        Most bytes of anonymous memory of the process, what it holds already included; None sets no ceiling.
    plot
        Whether figures are drawn.

    Raises
    ------
    MergeError
        If the ceiling is too low; the message names the least that would do.
    """
    account = _Account(plan, plot)
    asked = thread_count(threads)
    minimum = account.needed(1, account.least_room(1))
    least = -(-(minimum + _VARIATION) // _MB) * _MB
    if max_ram is None:
        room = max(account.default_room, account.least_room(asked))
        return MemoryBudget(asked, room, account.needed(asked, room), least)
    if max_ram < minimum:
        raise MergeError(f"max_ram: this merge needs at least {megabytes(least)}, got {megabytes(max_ram)}")
    for comfortable in (True, False):
        for team in range(asked, 0, -1):
            floor = account.least_room(team)
            room_found = account.largest_room(team, max_ram, max(floor, _COMFORTABLE_ROOM) if comfortable else floor)
            if room_found is not None:
                note = f"{team} of {asked} threads were used, to stay within max_ram ({megabytes(max_ram)})"
                return MemoryBudget(team, room_found, account.needed(team, room_found), least, (note,) if team < asked else ())
    raise MergeError(f"max_ram: this merge needs at least {megabytes(least)}, got {megabytes(max_ram)}")

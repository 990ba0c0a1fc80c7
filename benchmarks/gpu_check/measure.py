"""Measures the rows of the table one by one; every line is written as soon as there is something to say, the last one of a row counts.

Runs as a process of its own, with ``benchmarks`` on PYTHONPATH: ``python measure.py LINES --device cuda --seconds 150``. A row goes
through its check first; one that fails has no speed. What torch.compile makes of a peer is measured when all rows are done: compiling
takes longer than measuring.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import rows_bases
import rows_gating_experts
import rows_gating_features
import rows_gating_multi
import rows_kernel
import rows_lowrank
import rows_mask
import rows_merge
import rows_prefix_layers
import rows_train
import rows_windows
import torch
from attempt import Attempt
from contest import Contest, Row, gate
from sections import Clock
from timing import Timer, Timing, copy_bandwidth

import rows_topk_gate
import rows_window_norms
import taskloom
from taskloom.ops._backends import OPS

# What is aimed at comes first, so that it is there where the time runs out.
ROWS: tuple[Row, ...] = tuple(
    sorted(
        (
            *rows_merge.ROWS,
            *rows_mask.ROWS,
            *rows_train.ROWS,
            *rows_lowrank.ROWS,
            *rows_kernel.ROWS,
            *rows_bases.ROWS,
            *rows_gating_features.ROWS,
            *rows_prefix_layers.ROWS,
            *rows_windows.ROWS,
            *rows_window_norms.ROWS,
            *rows_gating_multi.ROWS,
            *rows_topk_gate.ROWS,
            *rows_gating_experts.ROWS,
        ),
        key=lambda row: (not row.aim, row.op not in ("masked_adamw_", "masked_sgd_")),
    )
)
BACKENDS = ("native", "triton")
REHEARSAL_BITS = 12
FULL_MEMORY = 60 << 30
COMPILE_SECONDS = 40.0
NOT_BUILT = "op not built"


def entries_of(row: Row, device: torch.device, rehearsal: bool) -> int:
    """Entries of a row: fewer on a GPU with less memory, few in a rehearsal."""
    if rehearsal:
        return 1 << REHEARSAL_BITS
    bits, memory = row.bits, torch.cuda.get_device_properties(device).total_memory
    while memory < FULL_MEMORY and bits > 16:
        bits, memory = bits - 1, 2 * memory
    return 1 << bits


def obstacle(op: str, backend: str, device: torch.device) -> str | None:
    """Why a backend cannot serve an op here; None where it can."""
    if op not in OPS:
        return NOT_BUILT
    obstacles: dict[str, str | None] = dict(taskloom.explain(op, device=str(device)).obstacles)
    return obstacles[backend]


class Lines:
    """Writes the current state of each line of the table, one JSON object a line."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def say(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


class Measurement:
    """One row in one dtype: its lines for all backends, with the peers that they share."""

    def __init__(self, row: Row, dtype: torch.dtype, entries: int, device: torch.device, timer: Timer, lines: Lines, clock: Clock) -> None:
        self.row, self.dtype, self.entries, self.device = row, dtype, entries, device
        self.timer, self.lines, self.clock = timer, lines, clock
        self.measured: list[dict[str, Any]] = []

    def line(self, backend: str, status: str, reason: str = "", **more: Any) -> dict[str, Any]:
        aim = dict(self.row.aim) if self.dtype in (torch.bfloat16, torch.bool) else {}
        kind = str(self.dtype).removeprefix("torch.")
        head = {"op": self.row.op, "use": self.row.use, "backend": backend, "dtype": kind, "entries": self.entries, "aim": aim}
        return {**head, "status": status, "reason": reason, **more}

    def run(self) -> None:
        """Check and time every backend that serves, then the peers."""
        able = []
        for backend in BACKENDS:
            reason = obstacle(self.row.op, backend, self.device)
            if reason is None:
                able.append(backend)
            else:
                self.lines.say(self.line(backend, reason if reason == NOT_BUILT else "not served", reason))
        if not able:
            return
        with Attempt() as made:
            contest = self.row.make(self.device, self.dtype, self.entries)
        if made.error is not None:
            for backend in able:
                self.lines.say(self.line(backend, "FAILED", made.reason))
            return
        for backend in able:
            self._ours(contest, backend)
        if self.measured:
            self._peers({name: lambda call=call: call for name, call in contest.peers.items()}, least_left=1.0)

    def run_compiled(self, rehearsal: bool) -> None:
        """Time what torch.compile makes of a peer, where the row has one and was measured."""
        if not self.measured:
            return
        contest = self.row.make(self.device, self.dtype, self.entries)
        if contest.compiled is not None:
            function, given = contest.compiled
            make = partial(compiled_call, function, given, rehearsal)
            self._peers({"torch.compile": make}, least_left=0.0 if rehearsal else COMPILE_SECONDS)

    def _ours(self, contest: Contest, backend: str) -> None:
        """Check, then time one backend; a line without a speed where the check fails."""
        with Attempt() as attempt:
            gate(contest, backend)
            with taskloom.backend(backend):
                timing = self.timer.time(contest.ours)
        if attempt.error is not None:
            self.lines.say(self.line(backend, "FAILED", attempt.reason))
            return
        copy = copy_bandwidth(self.timer, min(1 << 30, max(1 << 20, contest.bytes // 2)))
        speed = contest.bytes / (1e-3 * timing.median)
        found = self.line(backend, "measured", bytes=contest.bytes, ours=timing.as_dict(), gigabytes_per_second=speed / 1e9)
        found |= {"copy_gigabytes_per_second": copy / 1e9, "share_of_copy": speed / copy, "peers": {}}
        self.measured.append(found)
        self.lines.say(found)

    def _peers(self, peers: Mapping[str, Callable[[], Callable[[], Any]]], least_left: float) -> None:
        for name, make in peers.items():
            answer = timed_peer(self.timer, make) if self.clock.left() > least_left else "no time left"
            for found in self.measured:
                if isinstance(answer, Timing):
                    found["peers"][name] = answer.as_dict() | {"over_ours": answer.median / found["ours"]["ms"]}
                else:
                    found["peers"][name] = {"status": answer}
                self.lines.say(found)


def compiled_call(function: Callable[..., Any], given: tuple[Any, ...], rehearsal: bool) -> Callable[[], Any]:
    torch.compiler.reset()
    compiled = torch.compile(function, dynamic=False, backend="eager" if rehearsal else "inductor")
    return lambda: compiled(*given)


def timed_peer(timer: Timer, make: Callable[[], Callable[[], Any]]) -> Timing | str:
    """A peer's time, or in a few words why there is none."""
    # A peer may refuse these sizes (quantile), need more memory or be absent (Liger): that is an answer, not an end.
    with Attempt() as attempt:
        return timer.time(make())
    return attempt.reason


def broken(op: str) -> None:
    """Spoil an op's results under every backend but the reference: for tests of the check itself."""
    right = getattr(taskloom, op)

    def wrong(*arguments: Any, **named: Any) -> Any:
        result = right(*arguments, **named)
        if taskloom.ops._backends.requested_backend() != "reference":
            result.view(-1)[0] = ~result.view(-1)[0] if result.dtype in (torch.bool, torch.uint8) else result.view(-1)[0] + 1e6
        return result

    setattr(taskloom, op, wrong)


def release(device: torch.device) -> None:
    """Give the memory of a row back, whose tensors the next may need as one piece."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the rows of the GPU table.")
    parser.add_argument("lines", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--rehearsal", action="store_true")
    parser.add_argument("--break", dest="breaks", metavar="OP")
    given = parser.parse_args()
    device = torch.device(given.device)
    clock = Clock(given.seconds)
    if given.breaks:
        broken(given.breaks)
    timer = Timer(device, *((0.001, 3, 2) if given.rehearsal else ()))
    planned = [(row, dtype) for row in ROWS for dtype in row.dtypes]
    with given.lines.open("a") as file:
        lines = Lines(file)
        measurements = [
            Measurement(row, dtype, entries_of(row, device, given.rehearsal), device, timer, lines, clock) for row, dtype in planned
        ]
        for one in measurements:
            for backend in BACKENDS:
                lines.say(one.line(backend, "not measured", "no time left"))
        for one in measurements:
            if clock.left() == 0:
                break
            one.run()
            release(device)
        for one in measurements:
            one.run_compiled(given.rehearsal)
            release(device)


if __name__ == "__main__":
    main()

"""What a call of each op of the masked family costs on tensors of eight entries, beside ops of torch, in one run.

    python benchmarks/bench_calls.py [--json NAME.json]

Ops without autograd are held against a plain op of torch, differentiable ones against a minimal op that is registered with
torch.library and has an autograd formula. Calls are timed in turn, in blocks, by the time of the one thread that makes them.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import environment
from call_rows import ENTRIES, Call, CallRow, rows
from spread import spread, summary

_WIDTH = 140


def _block(call: Call, calls: int) -> float:
    """Seconds of this thread's own time for one call, from a block of them: other programs' time does not count."""
    begin = time.thread_time()
    for _ in range(calls):
        call()
    return (time.thread_time() - begin) / calls


def measure(row: CallRow, rounds: int, calls: int) -> dict[str, Any]:
    """Median with lowest and highest of the op, its peer and the native op alone, and of the ratios block by block."""
    named: dict[str, Call] = {"ours": row.ours, "peer": row.peer} | ({"native": row.native} if row.native else {})
    times: dict[str, list[float]] = {name: [] for name in named}
    for call in named.values():
        _block(call, calls)
    for _ in range(rounds):
        for name, call in named.items():
            times[name].append(_block(call, calls))
    ratios = [own / other for own, other in zip(times["ours"], times["peer"], strict=True)]
    return {
        "op": row.op,
        "use": row.use,
        "peer": row.peer_name,
        "limit": row.limit,
        "microseconds": {name: summary([1e6 * one for one in taken]) for name, taken in times.items()},
        "over_peer": summary(ratios),
        "reached": statistics.median(ratios) <= row.limit,
    }


def table(found: list[dict[str, Any]]) -> Table:
    shown = Table("op", "ours, us", "native alone, us", "peer, us", "peer", "ours / peer", "limit", "reached")
    for one in found:
        times = one["microseconds"]
        native = f"{times['native']['median']:.2f}" if "native" in times else ""
        name = f"{one['op']}, {one['use']}" if one["use"] else one["op"]
        cells = (f"{times['ours']['median']:.2f}", native, f"{times['peer']['median']:.2f}", one["peer"], spread(one["over_peer"]))
        shown.add_row(name, *cells, f"{one['limit']:g}", "yes" if one["reached"] else "no")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description="What a call of each op costs on tensors of a few entries.")
    parser.add_argument("--json", type=Path, help="file to keep the figures in, under benchmarks/results")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--calls", type=int, default=200, help="calls in a block")
    given = parser.parse_args()
    torch.set_num_threads(1)
    table_rows = rows()
    # What is there stays there, so that a collection looks at what the calls leave alone.
    gc.freeze()
    found = [measure(row, given.rounds, given.calls) for row in table_rows]
    Console(width=_WIDTH).print(table(found))
    if given.json:
        facts = {"device": environment.device(), "versions": environment.versions(), "threads": 1, **environment.commit()}
        whole = {**facts, "entries": ENTRIES, "calls": found}
        (Path(__file__).parent / "results" / given.json.name).write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    main()

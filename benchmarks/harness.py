"""What every benchmark shares: a row of the table, the measured copy ceiling, and the figures that go into the JSON beside the times."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import taskloom
from taskloom.ops import _library

COPY_BYTES = 1 << 27


@dataclass(frozen=True)
class Contest:
    """One op on one set of inputs.

    ``gate`` raises unless the op is right on a slice of these inputs; ``bytes`` is what it must move at least, every read and write;
    ``peers`` are other ways to the same result, each timed beside the op in one run.
    """

    ours: Callable[[], Any]
    gate: Callable[[], None]
    bytes: int
    peers: Mapping[str, Callable[[], Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A line of a family's table: a name, and the contest for a dtype. Inputs are made when the row runs, and freed after it."""

    name: str
    make: Callable[[torch.dtype], Contest]


def seconds_of(call: Callable[[], Any], rounds: int) -> float:
    """Median wall time of a call after one that is not counted (or of the only one, for calls that take seconds)."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        if times[0] > 1:
            break
    return statistics.median(times[1:] or times)


def copy_bandwidth() -> float:
    """Bytes per second, read and written together, of a copy between two large tensors: the ceiling of everything that streams."""
    source, target = torch.ones(COPY_BYTES // 4), torch.ones(COPY_BYTES // 4)
    return 2 * COPY_BYTES / seconds_of(lambda: target.copy_(source), 5)


def device_name() -> str:
    """The processor's model, as Linux names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def environment() -> dict[str, Any]:
    """Device and versions."""
    return {
        "device": device_name(),
        "cpu_level": _library.cpu_level(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "taskloom": taskloom.__version__,
        "python": platform.python_version(),
    }


def figures(contest: Contest, seconds: float) -> dict[str, Any]:
    """The op's speed beside the copy ceiling, and its ratio to each peer, all measured now."""
    ceiling = copy_bandwidth()
    peers = {name: seconds_of(call, 3) for name, call in contest.peers.items()}
    return {
        "bytes": contest.bytes,
        "gigabytes_per_second": contest.bytes / seconds / 1e9,
        "copy_gigabytes_per_second": ceiling / 1e9,
        "share_of_copy": contest.bytes / seconds / ceiling,
        "peer_seconds": peers,
        "times_as_fast_as": {name: value / seconds for name, value in peers.items()},
    }


def line(name: str, seconds: float, found: Mapping[str, Any]) -> str:
    """One line of the printed table."""
    ratios = ", ".join(f"{ratio:.1f}x {peer}" for peer, ratio in found["times_as_fast_as"].items())
    return (
        f"{name:<44}{1e3 * seconds:9.1f} ms{found['gigabytes_per_second']:8.2f} GB/s{100 * found['share_of_copy']:6.0f}% of copy  {ratios}"
    )

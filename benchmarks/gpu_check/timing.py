"""Times calls on a device: events on a GPU, a clock on the CPU; caches flushed before each call, warm-up left out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_WARM_UP = 3
_FLUSH_BYTES_ON_CPU = 1 << 22


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, and the memory that it takes at its peak beyond what was there."""

    median: float
    p20: float
    p80: float
    calls: int
    peak_bytes: int | None

    def as_dict(self) -> dict[str, Any]:
        return {"ms": self.median, "p20": self.p20, "p80": self.p80, "calls": self.calls, "peak_bytes": self.peak_bytes}


def of_samples(milliseconds: Sequence[float], peak_bytes: int | None) -> Timing:
    """Median and the percentiles 20 and 80 of the samples."""
    ordered = sorted(milliseconds)
    place = (len(ordered) - 1) / 5
    return Timing(statistics.median(ordered), ordered[round(place)], ordered[round(4 * place)], len(ordered), peak_bytes)


class Timer:
    """Times calls on one device.

    Parameters
    ----------
    device
        Where the calls work.
    seconds
        About how long the timed calls of one measurement may take together.
    most, least
        Bounds of the number of timed calls.
    """

    def __init__(self, device: torch.device, seconds: float = 0.5, most: int = 50, least: int = 5) -> None:
        self.device, self.seconds, self.most, self.least = device, seconds, most, least
        # Twice what the last cache holds, so that nothing of a call's inputs is left in it.
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _FLUSH_BYTES_ON_CPU
        self._flushed = torch.empty(size, dtype=torch.uint8, device=device)

    def _one(self, call: Callable[[], Any]) -> float:
        self._flushed.zero_()
        if self.device.type != "cuda":
            begin = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - begin)
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin_event.record()
        call()
        end_event.record()
        end_event.synchronize()
        return begin_event.elapsed_time(end_event)

    def _peak(self, call: Callable[[], Any]) -> int | None:
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def time(self, call: Callable[[], Any]) -> Timing:
        """Warm up, then time as many calls as fit."""
        peak = self._peak(call)
        first = max(min(self._one(call) for _ in range(_WARM_UP)), 1e-3)
        calls = max(self.least, min(self.most, int(1e3 * self.seconds / first)))
        return of_samples([self._one(call) for _ in range(calls)], peak)


def copy_bandwidth(timer: Timer, bytes_each: int) -> float:
    """Bytes a second that a large copy reads and writes: the ceiling of everything that streams."""
    source = torch.randint(0, 255, (bytes_each,), dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    return 2 * bytes_each / (1e-3 * timer.time(lambda: target.copy_(source)).median)

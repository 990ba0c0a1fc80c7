"""Peak memory of a call in this process."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def _resident(field: str) -> int:
    """A memory field of this process in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def resident_rise(run: Callable[[], Any]) -> int:
    """Bytes that a call had resident at most, above what was there before it. Linux; the peak is reset through /proc."""
    # Garbage that goes while the call runs would be taken off its rise.
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def allocated_rise(run: Callable[[], Any]) -> int:
    """Bytes that a call took from torch's allocator on the GPU at most, above what was there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before

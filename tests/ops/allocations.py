"""What torch's allocator gives out while something runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def allocated(call: Callable[[], Any]) -> int:
    """Bytes that torch's allocator gave out at most beside what there was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    most = held = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most

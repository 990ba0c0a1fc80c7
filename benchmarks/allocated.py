"""Memory that a call takes from torch's allocator on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def peak_allocated(call: Callable[[], Any]) -> int:
    """Bytes at most, at one time, beside what there was before the call; its result is among them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    most = held = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most

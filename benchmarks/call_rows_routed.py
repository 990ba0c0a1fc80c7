"""What one call of each op of the routed family costs on tensors of a few entries, beside torch's own ops of the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import call_rows_window_norms

# A call takes a window for each sample beside what the peer takes, and looks at it.
LIMIT = 4.0

Call = Callable[[], Any]


def calls() -> list[tuple[str, Call, Call, str, Call | None]]:
    """Op, ours, peer, the peer's name and the native op alone."""
    return [*call_rows_window_norms.calls()]

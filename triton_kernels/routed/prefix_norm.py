"""prefix_norm: torch's own statistics and normalisations, which take vectors of the prefix only."""

from __future__ import annotations

from taskloom.ops.routed._prefix_norms import prefix_norm, prefix_norm_backward

__all__ = ["prefix_norm", "prefix_norm_backward"]

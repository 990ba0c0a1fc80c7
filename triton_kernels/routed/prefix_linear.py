"""prefix_linear: torch's own products read a view of the weight by its stride, and nothing is left for a kernel to save."""

from __future__ import annotations

from taskloom.ops.routed._prefix_products import prefix_linear, prefix_linear_backward

__all__ = ["prefix_linear", "prefix_linear_backward"]

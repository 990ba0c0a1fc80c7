"""The lowrank family: kernelized low-rank merges."""

from __future__ import annotations

from taskloom.reference.lowrank import rmm_fit, rmm_linear, rmm_reconstruct

__all__ = ["rmm_fit", "rmm_linear", "rmm_reconstruct"]

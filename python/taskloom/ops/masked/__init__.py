"""The masked family: sparse masked updates and merges of task vectors."""

from __future__ import annotations

from taskloom.ops.masked.packed_mask import pack_mask, unpack_mask

__all__ = ["pack_mask", "unpack_mask"]

"""The masked family in plain torch."""

from __future__ import annotations

from taskloom.reference.masked.packed_mask import pack_mask, unpack_mask

__all__ = ["pack_mask", "unpack_mask"]

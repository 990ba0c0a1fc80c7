"""Verification of a finished merge: its tensors computed again with the reference, and its files checked."""

from __future__ import annotations

from taskloom.merge.verify.report import Check, TensorCheck, VerifyReport
from taskloom.merge.verify.run import verify_merge

__all__ = ["Check", "TensorCheck", "VerifyReport", "verify_merge"]

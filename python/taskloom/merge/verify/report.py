"""What a verification found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """One kind of check: ``files``, ``report``, ``digests``, ``inputs``, ``tensors`` or ``values``.

    ``detail`` says what held, or why the check was skipped; ``problems`` what did not hold.
    """

    name: str
    status: Status
    detail: str
    problems: list[str]


@dataclass(frozen=True)
class FirstWrong:
    """The first wrong entry of a tensor (the first wrong byte, where bytes were compared); ``nan`` and ``inf`` are text."""

    index: int
    found: float | str
    expected: float | str


@dataclass(frozen=True)
class TensorCheck:
    """One tensor that was computed again.

    Attributes
    ----------
    name, shape, dtype, kind
        The tensor; ``kind`` is ``merged`` or ``copied``.
    criterion
        ``bits``: every bit must be equal (NaN to any NaN). ``rounding``: an entry may be one unit in its last place off, and by the
        rounding of a sum over the tensor.
    ok
        Whether no entry is wrong.
    entries, differing, wrong
        Counts: all; those whose bits differ; those that the criterion does not allow.
    max_abs, max_ulp, relative_norm
        Largest difference, as a number and in units in the last place of ``dtype``; norm of the difference over that of the expected
        tensor. None where not finite, or where bytes were compared.
    first_wrong
        None where none is.
    """

    name: str
    shape: list[int]
    dtype: str
    kind: Literal["merged", "copied"]
    criterion: Literal["bits", "rounding"]
    ok: bool
    entries: int
    differing: int
    wrong: int
    max_abs: float | None
    max_ulp: float | None
    relative_norm: float | None
    first_wrong: FirstWrong | None


@dataclass(frozen=True)
class VerifyReport:
    """A whole verification. ``problems`` are those of all checks; ``ok`` is true where there is none.

    ``verified_`` and ``of_`` count tensors and bytes of the output; ``sample_seed`` chose them (None: all, or all of a pattern).
    """

    output: str
    ok: bool
    method: str
    seed: int
    problems: list[str]
    checks: list[Check]
    tensors: list[TensorCheck]
    verified_tensors: int
    of_tensors: int
    verified_bytes: int
    of_bytes: int
    sample_seed: int | None
    notes: list[str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The report as plain types."""
        return asdict(self)

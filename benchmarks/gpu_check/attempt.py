"""Holds on to what goes wrong in a part, so that the parts after it are still looked at."""

from __future__ import annotations

from types import TracebackType

_LONGEST = 80


class Attempt:
    """A block whose error is kept as a value; whatever can go wrong in one row of a table must not take the others with it."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if isinstance(error, Exception):
            self.error = error
            return True
        return False

    @property
    def reason(self) -> str:
        """The first line of the error, shortened."""
        text = (str(self.error).strip().splitlines() or [""])[0] or type(self.error).__name__
        return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."

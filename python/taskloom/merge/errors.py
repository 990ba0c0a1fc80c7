"""What a merge raises when its recipe, its inputs or its output folder are not what they should be."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

# Nobody mistypes a longer word, and difflib takes the square of its length.
_LONGEST_WORD = 64

_REPR = reprlib.Repr()
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 8
_REPR.maxlevel = 4
_REPR.maxstring = _REPR.maxother = 200
_REPR.maxlong = 60


class MergeError(Exception):
    """A merge that cannot be done as asked; the message says which part, what was expected and what came."""


class RecipeError(MergeError):
    """A recipe that cannot be read or that asks for something that does not exist."""


class CheckpointError(MergeError):
    """A checkpoint that cannot be found, is damaged, or does not fit the others."""


class OutputError(MergeError):
    """An output folder that may not be written."""


class ReportError(MergeError):
    """A merge report that cannot be read, or that is none."""


def shown(value: object) -> str:
    """The ``repr`` of something that came from outside, cut to a length that fits into a message whatever the value is."""
    return _REPR.repr(value)


def near_miss(word: str, known: Iterable[str]) -> str:
    """A ``did you mean`` clause for ``word``, or the empty string where nothing in ``known`` is close."""
    if len(word) > _LONGEST_WORD:
        return ""
    close = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""

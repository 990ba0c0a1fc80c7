"""Globs over tensors' names, as ``verify``, ``diff`` and ``inspect`` take them."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from taskloom.merge.errors import MergeError


def matching_names(names: Iterable[str], pattern: str | None) -> list[str]:
    """The names that match a glob (``*``, ``?``, ``[...]``; the whole name, case counts), in their order; all without one.

    Raises
    ------
    MergeError
        If none does.
    """
    known = list(names)
    found = [name for name in known if pattern is None or fnmatchcase(name, pattern)]
    if pattern is not None and not found:
        raise MergeError(f"no tensor matches {pattern!r}; the names are such as {', '.join(map(repr, known[:3])) or 'none'}")
    return found

"""JSON as serde_json reads it, which safetensors is built on: stricter than Python's about numbers, Unicode and depth."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

# serde_json opens at most so many brackets one inside the other.
MOST_DEPTH = 127

_NUMBER = re.compile(r"-?(?P<whole>\d+)(?:\.(?P<fraction>\d+))?(?:[eE](?P<exponent>[+-]?\d+))?")
_CERTAIN = 1e308

_ALL_ZERO = bytes.maketrans(b"123456789", b"0" * 9)
_LONG = b"0" * 21


class JsonError(ValueError):
    """Text that is not JSON; the message says why."""


class RepeatedKeys(dict[str, Any]):
    """An object that gives some of its keys more than once; as a dict it holds the last value of each."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        seen: set[str] = set()
        self.repeated: list[str] = []
        for key, _ in pairs:
            if key in seen:
                self.repeated.append(key)
            seen.add(key)


def repeated_keys(value: dict[str, Any]) -> list[str]:
    """The keys that an object gives more than once."""
    return value.repeated if isinstance(value, RepeatedKeys) else []


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else RepeatedKeys(pairs)


def _rounds_to_infinity(text: str) -> bool:
    """Whether serde_json finds a number beyond 1e308 out of range.

    It keeps the digits that fit 64 bits and multiplies by a power of ten, so its limit is within a few units of float64's.
    """
    match = _NUMBER.fullmatch(text)
    if match is None:
        return True
    exponent = match["exponent"] or ""
    digits = exponent.lstrip("+-0")
    if len(digits) > 9:
        return True
    whole, fraction = match["whole"], match["fraction"] or ""
    significand, power = 0, int(digits or "0") * (-1 if exponent.startswith("-") else 1)
    for place, digit in enumerate(whole):
        if significand * 10 + int(digit) >= 2**64:
            power += len(whole) - place
            break
        significand = significand * 10 + int(digit)
    for digit in fraction:
        if significand * 10 + int(digit) >= 2**64:
            break
        significand = significand * 10 + int(digit)
        power -= 1
    return power > 308 or math.isinf(float(significand) * float(f"1e{power}"))


def _float(text: str) -> float:
    value = float(text)
    if abs(value) > _CERTAIN:
        if _rounds_to_infinity(text):
            raise JsonError(f"number out of range: {text[:40]}")
        value = math.copysign(min(abs(value), sys.float_info.max), value)
    return value


def _integer(text: str) -> int | float:
    if len(text) > 20:
        # Also keeps int() away from more digits than it takes in bounded time.
        _float(text)
    return -0.0 if text == "-0" else int(text)


def _has_odd_integers(raw: bytes) -> bool:
    """Whether some whole number may need :func:`_integer`, which costs far more than Python's own reading of the others."""
    return b"-0" in raw or _LONG in raw.translate(_ALL_ZERO)


def _constant(text: str) -> NoReturn:
    raise JsonError(f"{text} is no JSON")


def parse_json(raw: bytes, *, constants: bool = False) -> Any:
    """Parse UTF-8 JSON; objects that repeat a key become :class:`RepeatedKeys`.

    Depth and lone surrogates are left to :func:`check_tree`, which costs as much again and is needed only for what is not looked at.

    Parameters
    ----------
    raw
        The whole document.
    constants
        Accept ``NaN``, ``Infinity`` and ``-Infinity``, which Python writes.

    Raises
    ------
    JsonError
        If it is not JSON.
    """
    constant = None if constants else _constant
    integer = _integer if _has_odd_integers(raw) else None
    try:
        text = raw.decode("utf-8")
        return json.loads(text, object_pairs_hook=_object, parse_float=_float, parse_int=integer, parse_constant=constant)
    except RecursionError as error:
        raise JsonError("nested too deeply") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise JsonError(str(error)) from error


def is_unicode(text: str) -> bool:
    """Whether a string holds no half of a surrogate pair, which JSON can spell and UTF-8 cannot hold."""
    return text.isprintable() or not any(0xD800 <= ord(character) < 0xE000 for character in text)


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def check_tree(value: Any, depth: int = 0) -> None:
    """Check nesting and Unicode in everything below ``value``, which itself stands inside ``depth`` brackets.

    Raises
    ------
    JsonError
        If brackets are nested more than 127 deep, or a string holds a lone surrogate.
    """
    rest = [(value, depth)]
    while rest:
        item, outside = rest.pop()
        if isinstance(item, str):
            if not is_unicode(item):
                raise JsonError("a string is not valid Unicode (half of a surrogate pair)")
        elif isinstance(item, dict | list):
            if outside >= MOST_DEPTH:
                raise JsonError(f"nested too deeply (more than {MOST_DEPTH} levels)")
            rest.extend((child, outside + 1) for child in _children(item))

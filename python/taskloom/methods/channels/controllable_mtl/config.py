"""The widths that a controllable multi-task network runs at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from taskloom.nn import Width

NetworkWidth = float | tuple[Width, ...]


def check_ratio(what: str, width: Any) -> float:
    """The ratio as a float; raise unless it is a number in (0, 1] that cannot be taken for a number of channels."""
    if not isinstance(width, float):
        raise TypeError(f"{what}: expected a ratio such as 0.5 (1.0 for full width), got {width!r}")
    if not 0 < width <= 1:
        raise ValueError(f"{what}: expected a ratio in (0, 1], got {width}")
    return width


def _checked(what: str, width: Any) -> NetworkWidth:
    if not isinstance(width, tuple | list):
        return check_ratio(what, width)
    if not width:
        raise ValueError(f"{what}: expected a width per layer, got none")
    for place, one in enumerate(width):
        if type(one) is not int:
            check_ratio(f"{what}[{place}]", one)
        elif one < 1:
            raise ValueError(f"{what}[{place}]: expected at least 1 channel, got {one}")
    return tuple(width)


@dataclass(frozen=True, eq=False, init=False)
class WidthConfig:
    """The widths of an encoder and of each task's decoder.

    Attributes
    ----------
    encoder
        A ratio in (0, 1] for the whole encoder, or a tuple with a width for each of its parts (:attr:`SlimMultiTask.parts`): ratios as
        floats, or channels as integers. Default 1.0.
    decoders
        The same for each task; the parts of a decoder are its slim layers. Default: none.

    Raises
    ------
    TypeError
        If a width is not a number, or an integer is given for a whole network.
    ValueError
        If a ratio is not in its range, or a number of channels is below 1.

    Notes
    -----
    Two are equal where all widths are, where 1 (a channel) is not 1.0 (all). Do not change ``decoders`` afterwards.
    Source: arXiv 2308.11744.
    """

    encoder: NetworkWidth
    decoders: Mapping[str, NetworkWidth]

    def __init__(self, encoder: Any = 1.0, decoders: Mapping[str, Any] | None = None) -> None:
        object.__setattr__(self, "encoder", _checked("encoder", encoder))
        given = {} if decoders is None else decoders
        object.__setattr__(self, "decoders", {task: _checked(f"decoders[{task!r}]", width) for task, width in given.items()})

    def _key(self) -> tuple[str, frozenset[tuple[str, str]]]:
        return repr(self.encoder), frozenset((task, repr(width)) for task, width in self.decoders.items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WidthConfig) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

"""The width that slim layers run at: how a ratio becomes channels, and how it reaches every layer of a model."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

from torch import Tensor, nn

Width: TypeAlias = int | float
Widths: TypeAlias = float | Mapping[str, Width]


def make_divisible(v: float, divisor: int = 8, min_value: int = 1) -> int:
    """Round a number of channels to a multiple of ``divisor``, to a tenth less at most.

    Parameters
    ----------
    v
        Channels, such as a width's share of a layer's.
    divisor
        What the result is a multiple of. Default 8.
    min_value
        The least result. Default 1.

    Returns
    -------
    int
        The nearest multiple (halves go up), at least ``min_value``, or where that is below 0.9 v, ``divisor`` more.

    Raises
    ------
    ValueError
        If ``divisor`` is less than 1, or ``v`` is not finite.

    Notes
    -----
    Source: the code of slimmable networks, Yu et al., arXiv 1812.08928; with its quirk that 3.9 gives 9 = 1 + 8.
    """
    if divisor < 1:
        raise ValueError(f"make_divisible: divisor: expected at least 1, got {divisor}")
    if not -math.inf < v < math.inf:
        raise ValueError(f"make_divisible: v: expected a finite number, got {v}")
    nearest = max(min_value, int(v + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * v else nearest


def active_channels(what: str, width: Width, whole: int, divisor: int) -> int:
    """The channels that a width means of ``whole``: a ratio in (0, 1], rounded by :func:`make_divisible`, or an integer of channels."""
    if isinstance(width, bool | Tensor) or not isinstance(width, int | float):
        raise TypeError(f"{what}: expected a ratio or an integer of channels, got {type(width).__name__}")
    if isinstance(width, int):
        if not 1 <= width <= whole:
            raise ValueError(f"{what}: expected 1 to {whole} channels, got {width}")
        return width
    if not 0 < width <= 1:
        raise ValueError(f"{what}: expected a ratio in (0, 1], got {width}")
    return whole if width == 1 else min(whole, make_divisible(whole * width, divisor))


class _Running(threading.local):
    """The layers that :func:`use_width` holds in this thread, by identity: their widths, and the names of the configurations."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Width, str | None]] = {}


_RUNNING = _Running()
_WHOLE: tuple[Width, str | None] = (1.0, None)


class SlimLayer(nn.Module):
    """What a layer knows of the widths of its model, in the thread that asks.

    That is kept outside of the layer, so that threads can run one model at widths of their own, and copies know nothing of it.
    """

    @property
    def width(self) -> Width:
        """The layer's own width; 1.0 outside of :func:`use_width`."""
        return _RUNNING.layers.get(id(self), _WHOLE)[0]

    @property
    def configuration(self) -> str | None:
        """The name of the whole configuration; None where all is at full width."""
        return _RUNNING.layers.get(id(self), _WHOLE)[1]


def _found(widths: Mapping[str, Width], path: str) -> tuple[str, Width]:
    """The longest key that is the path or a parent of it, and its width; 1.0 where there is none."""
    while path not in widths:
        if not path:
            return "", 1.0
        path = path.rpartition(".")[0]
    return path, widths[path]


def _as_mapping(model: nn.Module, widths: Widths) -> dict[str, Width]:
    """One entry per part of the model, checked, without entries that repeat what a parent says."""
    if not isinstance(widths, Mapping):
        if isinstance(widths, int):
            raise TypeError(f"use_width: expected a ratio such as 0.5 or a mapping, got the integer {widths}; channels are set by layer")
        widths = {"": widths}
    layers = [name for name, module in model.named_modules() if isinstance(module, SlimLayer)]
    for key, width in widths.items():
        if not isinstance(key, str):
            raise TypeError(f"use_width: expected paths of slim layers or of their parents, got {key!r}")
        # How many channels an integer may be, only the layer knows.
        if type(width) is not int:
            active_channels(f"use_width: {key!r}", width, 1, 1)
        elif width < 1:
            raise ValueError(f"use_width: {key!r}: expected at least 1 channel, got {width}")
        elif key not in layers and any(name.startswith(f"{key}.") or not key for name in layers):
            raise TypeError(f"use_width: {key!r}: expected a ratio for its layers, got the integer {width}; channels are set by layer")
        if not any(name == key or name.startswith(f"{key}.") or not key for name in layers):
            raise ValueError(f"use_width: expected paths of slim layers or of their parents, got {key!r}, which has none")
    given = {"": 1.0, **widths}
    return {key: width for key, width in sorted(given.items()) if not key or _found(given, key.rpartition(".")[0])[1] != width}


def configuration_name(model: nn.Module, widths: Widths) -> str | None:
    """The name that calibrated statistics are kept under; None where every layer has its full width."""
    mapping = _as_mapping(model, widths)
    if mapping == {"": 1.0}:
        return None
    return json.dumps(mapping[""] if len(mapping) == 1 else mapping)


@contextmanager
def use_width(model: nn.Module, widths: Widths) -> Iterator[None]:
    """Run the slim layers of a model at given widths inside the block.

    Parameters
    ----------
    model
        A model with :class:`SlimLinear`, :class:`SlimConv2d` or :class:`SlimNorm2d` layers. Give the whole model, not a part: the
        statistics of a normalisation depend on the widths of all that is before it.
    widths
        A ratio in (0, 1] for every layer, or a mapping from paths to widths: a layer takes that of its own path or else of its nearest
        parent with one (``""`` is the model; 1.0 without). A layer's own may be an integer: channels.

    Raises
    ------
    TypeError
        If a width is not a number, or one integer is given for several layers.
    ValueError
        If a ratio is not in its range, or a path leads to no slim layer.

    Notes
    -----
    Layers with ``slim_output=False``, and grouped convolutions, whose outputs follow their input, keep their own width. Blocks may be
    nested; the innermost holds. Widths hold in the thread that entered the block, and in no other: several threads can run one model at
    widths of their own, but what a block leaves to other threads (``nn.DataParallel``, checkpoints that autograd recomputes for a GPU)
    runs at full width.
    """
    mapping, name = _as_mapping(model, widths), configuration_name(model, widths)
    layers = {id(module): (_found(mapping, path)[1], name) for path, module in model.named_modules() if isinstance(module, SlimLayer)}
    before = _RUNNING.layers
    _RUNNING.layers = {**before, **layers}
    try:
        yield
    finally:
        _RUNNING.layers = before

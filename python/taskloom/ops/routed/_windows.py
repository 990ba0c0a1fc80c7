"""Windows of channels as arguments: their checks, and samples grouped by window."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from taskloom.ops._backends import active_transform

_native: Any = importlib.import_module("taskloom._native")

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# As an op takes it: where each sample's window starts, the largest width, and the widths where they differ.
Window: TypeAlias = tuple[Tensor, int, Tensor | None]
OutWindow: TypeAlias = tuple[Tensor | None, int, Tensor | None]
Keys: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]


def _integers(op: str, name: str, value: Tensor, samples: int) -> Tensor:
    """The tensor, if it holds one integer for each sample, or one for all."""
    if value.dtype not in INTEGERS:
        raise TypeError(f"{op}: {name}: expected integers, got {value.dtype}")
    if value.dim() and value.shape != (samples,):
        raise ValueError(f"{op}: {name}: expected shape ({samples},) as x has samples, or (), got {tuple(value.shape)}")
    return value


def window_of(
    op: str,
    samples: int,
    channels: int,
    start: Tensor | int,
    width: Tensor | int,
    like: Tensor,
    names: tuple[str, str] = ("start", "width"),
) -> Window:
    """Check a window's shapes and dtypes, and its numbers where they are not in a tensor.

    Where widths are a tensor, whose numbers may be on a GPU, the largest is taken to be ``channels``.
    """
    name, width_name = names
    if isinstance(start, bool) or not isinstance(start, (Tensor, int, torch.SymInt)):
        raise TypeError(f"{op}: {name}: expected integers, got {type(start).__name__}")
    if isinstance(width, bool) or not isinstance(width, (Tensor, int, torch.SymInt)):
        raise TypeError(f"{op}: {width_name}: expected an integer or a tensor of integers, got {type(width).__name__}")
    if not isinstance(width, Tensor) and not 0 <= width <= channels:
        raise ValueError(f"{op}: {width_name}: expected 0 to {channels}, the number of channels, got {width}")
    if not isinstance(start, Tensor):
        if start < 0 or (not isinstance(width, Tensor) and start + width > channels):
            raise _outside(op, names, start, width if isinstance(width, int) else 0, channels)
        start = torch.tensor(start, device=like.device)
    starts = _integers(op, name, start, samples)
    if isinstance(width, Tensor):
        return starts, channels, _integers(op, width_name, width, samples)
    return starts, width, None


def out_window_of(op: str, samples: int, channels: int, start: Tensor | int | None, width: Tensor | int | None, like: Tensor) -> OutWindow:
    """The same of a window of outputs, which may be missing."""
    if (start is None) != (width is None):
        missing, given = ("out_start", "out_width") if start is None else ("out_width", "out_start")
        raise ValueError(f"{op}: {missing}: expected both out_start and out_width, or neither, got only {given}")
    if start is None or width is None:
        return None, 0, None
    return window_of(op, samples, channels, start, width, like, ("out_start", "out_width"))


def window_tensors(*windows: Window | OutWindow) -> list[Tensor]:
    """The tensors among windows."""
    return [one for start, _, widths in windows for one in (start, widths) if one is not None]


def _outside(op: str, names: tuple[str, str], start: int, width: int, channels: int, place: str = "") -> ValueError:
    if width < 0:
        return ValueError(f"{op}: {names[1]}: expected no negative width, got {width}{place}")
    return ValueError(f"{op}: {names[0]}: expected windows within {channels} channels, got {start} to {start + width - 1}{place}")


def _checked(op: str, names: tuple[str, str], window: Window, samples: int, channels: int) -> Keys:
    """The start and width of each sample, [N, 2]; raise where one leaves the channels."""
    start, width, widths = window
    keys = np.empty((samples, 2), np.int64)
    keys[:, 0] = start.numpy(force=True)
    keys[:, 1] = width if widths is None else widths.numpy(force=True)
    # A sum of large numbers would wrap around.
    if samples and (keys.min() < 0 or (keys[:, 0] > channels - keys[:, 1]).any()):
        wrong = (keys < 0).any(1) | (keys[:, 0] > channels - keys[:, 1])
        sample = int(wrong.argmax())
        begin, wide = keys[sample].tolist()
        raise _outside(op, names, begin, wide, channels, f" for sample {sample}")
    return keys


def check_values(op: str, samples: int, channels: int, window: Window | OutWindow, names: tuple[str, str] = ("start", "width")) -> None:
    """What kernels look at themselves, for the reference; a transform has no values to look at."""
    start, width, widths = window
    if start is not None and active_transform() is None:
        _checked(op, names, (start, width, widths), samples, channels)


def assert_values(op: str, channels: int, window: Window | OutWindow, names: tuple[str, str] = ("start", "width")) -> None:
    """The same for a GPU, which says so when it comes to it: the host does not wait."""
    start, width, widths = window
    if start is None:
        return
    begin, wide = start.long(), width if widths is None else widths.long()
    inside = (begin >= 0) & (begin <= channels - wide)
    if isinstance(wide, Tensor):
        inside = inside & (wide >= 0)
    torch._assert_async(inside.all(), f"{op}: {names[0]}: expected windows within {channels} channels")


@dataclass(frozen=True, slots=True)
class Group:
    """Samples that have the same windows, in the order of their indices."""

    samples: list[int]
    seen: slice
    made: slice

    @property
    def width(self) -> int:
        """Channels that are seen."""
        return int(self.seen.stop - self.seen.start)

    def runs(self) -> list[tuple[int, int]]:
        """First and last sample (exclusive) of the samples that lie next to each other."""
        found: list[tuple[int, int]] = []
        for sample in self.samples:
            if found and found[-1][1] == sample:
                found[-1] = found[-1][0], sample + 1
            else:
                found.append((sample, sample + 1))
        return found


def window_keys(op: str, samples: int, channels: int, window: Window, outputs: int, out_window: OutWindow) -> Keys:
    """First channel and width of each sample's window, [N, 2], and of its window of outputs where there is one, [N, 4].

    Raises
    ------
    ValueError
        If a window leaves the channels.
    """
    keys = _checked(op, ("start", "width"), window, samples, channels)
    out_start, out_width, out_widths = out_window
    if out_start is None:
        return keys
    return np.concatenate([keys, _checked(op, ("out_start", "out_width"), (out_start, out_width, out_widths), samples, outputs)], 1)


def grouped(keys: Keys, outputs: int) -> list[Group]:
    """Samples grouped by window, sorted by it: those that see the same weights follow each other."""
    samples = len(keys)
    if samples and (keys == keys[0]).all():
        return [_group(list(range(samples)), keys[0].tolist(), outputs)]
    order, bounds = _native.plan_windows(keys)
    edges, sorted_samples = bounds.tolist(), order.tolist()
    firsts = keys[order[bounds[:-1]]].tolist()
    return [_group(sorted_samples[edges[g] : edges[g + 1]], first, outputs) for g, first in enumerate(firsts)]


def groups(op: str, samples: int, channels: int, window: Window, outputs: int, out_window: OutWindow) -> list[Group]:
    """The same of windows as an op takes them; raises as :func:`window_keys` does."""
    return grouped(window_keys(op, samples, channels, window, outputs, out_window), outputs)


def _group(samples: list[int], key: Sequence[int], outputs: int) -> Group:
    begin, width = key[:2]
    out_begin, out_width = (key[2], key[3]) if len(key) == 4 else (0, outputs)
    return Group(samples, slice(begin, begin + width), slice(out_begin, out_begin + out_width))

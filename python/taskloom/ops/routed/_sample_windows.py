"""The channel window of each sample, as the norms of the family take it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from taskloom.ops._backends import active_transform
from taskloom.reference.routed.window_norms import in_window

_INDICES = (torch.int64, torch.int32)
_SHORT = (torch.int16, torch.int8, torch.uint8)
# Start, the width of all windows (or the most that one may have), and the widths where they differ.
Windows = tuple[Tensor, int, Tensor | None]


def _one_for_each(op: str, name: str, values: Tensor, samples: int) -> Tensor:
    if not isinstance(values, Tensor) or values.dtype not in _INDICES + _SHORT:
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{op}: {name}: expected a tensor of integers, got {got}")
    if values.shape == ():
        values = values.expand(samples)
    elif values.shape != (samples,):
        raise ValueError(f"{op}: {name}: expected shape ({samples},), one for each sample of x, or (), got {tuple(values.shape)}")
    return values.long() if values.dtype in _SHORT else values


def sample_windows(op: str, start: Tensor, width: int | Tensor, samples: int, channels: int) -> Windows:
    """Start and width as the ops take them; what they hold is looked at by the kernels, or by :func:`check_values`."""
    starts = _one_for_each(op, "start", start, samples)
    if isinstance(width, Tensor):
        return starts, channels, _one_for_each(op, "width", width, samples)
    if isinstance(width, bool) or not isinstance(width, (int, torch.SymInt)):
        raise TypeError(f"{op}: width: expected an integer or a tensor of integers, got {type(width).__name__}")
    if not 1 <= width <= channels:
        raise ValueError(f"{op}: width: expected 1 to {channels}, the channels of x, got {width}")
    return starts, width, None


def window_tensors(windows: Windows) -> tuple[Tensor, ...]:
    """The tensors of windows."""
    return windows[:1] if windows[2] is None else (windows[0], windows[2])


def check_values(op: str, windows: Windows, channels: int) -> None:
    """Raise ValueError for a window that leaves the channels; a transform has no values to look at, and on a GPU that is an assertion."""
    start, width, widths = windows
    if active_transform() is not None:
        return
    sizes = torch.full_like(start, width) if widths is None else widths.to(start.dtype)
    wrong = (start < 0) | (sizes < 1) | (sizes > channels) | (start > channels - sizes)
    if start.is_cuda:
        torch._assert_async(~wrong.any(), f"{op}: start, width: expected windows within 0 to {channels}")
        return
    if wrong.any():
        n = int(wrong.nonzero()[0])
        raise ValueError(
            f"{op}: start, width: expected a window within 0 to {channels} channels, got start {int(start[n])} and width {int(sizes[n])} "
            f"for sample {n}"
        ) from None


def run_checked(op: str, windows: Windows, channels: int, run: Callable[..., Any], *arguments: Any) -> Any:
    """Run a kernel; where it found fault with the windows, which it looks at anyway, say so in the wrapper's words."""
    try:
        return run(*arguments)
    except RuntimeError:
        if not torch.compiler.is_compiling():
            check_values(op, windows, channels)
        raise


def outside_of(windows: Windows, channels: int) -> Tensor:
    """Whether each channel lies outside of each sample's window, [N, C]."""
    return ~in_window(*windows, channels)

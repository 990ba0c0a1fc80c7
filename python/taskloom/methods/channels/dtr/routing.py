"""Which channels a denoising timestep sees: DTR's sliding window, and the random channels that the paper compares with."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from taskloom.nn import TaskWindow

Formula = Literal["code", "paper"]
FORMULAS: tuple[Formula, ...] = ("code", "paper")


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return value


def active_channels(channels: int, beta: float) -> int:
    """Channels that a task sees: ``channels * beta``, rounded down in float64.

    Raises
    ------
    TypeError, ValueError
        If ``channels`` is no integer above 0, ``beta`` is not in (0, 1], or no channel would be left.
    """
    _count("channels", channels)
    if not 0 < beta <= 1:
        raise ValueError(f"beta: expected a share above 0 and at most 1, got {beta}")
    width = int(channels * beta)
    if width == 0:
        raise ValueError(f"beta: expected at least one channel of {channels} to stay active, got {beta}, which leaves none")
    return width


def dtr_starts(num_tasks: int, channels: int, beta: float = 0.8, alpha: float = 4.0, formula: Formula = "code") -> tuple[Tensor, Tensor]:
    """Each task's window of channels, ``start <= c < start + width``.

    Parameters
    ----------
    num_tasks
        T, the timesteps that the model was trained with.
    channels
        C, at the input of a residual block.
    beta
        Share of the channels that a task sees. Default 0.8; 1 means no routing.
    alpha
        Above 1 the window moves slowly at low timesteps and fast at high ones. Default 4.
    formula
        ``"code"``, the default: ``round((k / (T - 1)) ** alpha * L)`` with ``L = C - int(C * beta)``, of constant width, as the official
        code has it. ``"paper"``: ``round(L * (k / T) ** alpha)`` to ``round(L * ((k + 1) / T) ** alpha) + int(C * beta)``, as the paper's
        page has it: never narrower. Both round half to even.

    Returns
    -------
    start, width : int32 [T]

    Raises
    ------
    TypeError
        If a count is no integer.
    ValueError
        If a count is below 1, ``beta`` is not in (0, 1] or leaves no channel, ``alpha`` is not a finite number above 0, or the formula is
        unknown.

    Notes
    -----
    Source: Denoising Task Routing, arXiv 2310.07138, its official code and its project page.
    """
    _count("num_tasks", num_tasks)
    width = active_channels(channels, beta)
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha: expected a finite power above 0, got {alpha}")
    if formula not in FORMULAS:
        raise ValueError(f"formula: expected one of {', '.join(map(repr, FORMULAS))}, got {formula!r}")
    room = channels - width
    if formula == "code":
        start = np.round(np.linspace(0, 1, num_tasks) ** alpha * room)
        widths = np.full(num_tasks, width)
    else:
        edges = np.round(room * (np.arange(num_tasks + 1) / num_tasks) ** alpha)
        start, widths = edges[:-1], edges[1:] - edges[:-1] + width
    return torch.from_numpy(start.astype(np.int32)), torch.from_numpy(widths.astype(np.int32))


def dtr_window(num_tasks: int, channels: int, beta: float = 0.8, alpha: float = 4.0, formula: Formula = "code") -> TaskWindow:
    """The windows of :func:`dtr_starts`, with its arguments and errors, as a module that looks up those of a batch's timesteps."""
    return TaskWindow(*dtr_starts(num_tasks, channels, beta, alpha, formula), channels)


def random_routing_mask(num_tasks: int, channels: int, beta: float = 0.8, generator: torch.Generator | None = None) -> Tensor:
    """R-TR, the paper's ablation: for each task, channels chosen at random.

    Parameters
    ----------
    num_tasks, channels, beta
        As in :func:`dtr_starts`: each task sees ``int(channels * beta)`` channels.
    generator
        Default: torch's own.

    Returns
    -------
    bool [T, C]
        True where the task of the row sees the channel of the column.

    Raises
    ------
    TypeError, ValueError
        As :func:`dtr_starts`.
    """
    _count("num_tasks", num_tasks)
    width = active_channels(channels, beta)
    chosen = torch.rand(num_tasks, channels, generator=generator).argsort(1)[:, :width]
    return torch.zeros(num_tasks, channels, dtype=torch.bool).scatter_(1, chosen, True)


def check_timesteps(t: Tensor, num_tasks: int) -> None:
    """Raise TypeError where ``t`` is no tensor of integers, IndexError where one is outside [0, num_tasks) (looked at on a CPU)."""
    if not isinstance(t, Tensor) or t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        got = f"a tensor of {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"t: expected a tensor of integers, got {got}")
    if t.device.type == "cpu" and not torch.compiler.is_compiling() and t.numel():
        least, most = t.aminmax()
        if least < 0 or most >= num_tasks:
            raise IndexError(f"t: expected timesteps from 0 to {num_tasks - 1}, got {int(least if least < 0 else most)}")


class RandomRouting(nn.Module):
    """Channels of R-TR for one block: drawn once, and saved with the model.

    Parameters
    ----------
    num_tasks, channels, beta, generator
        As in :func:`random_routing_mask`. Every block draws its own.
    """

    mask: Tensor

    def __init__(self, num_tasks: int, channels: int, beta: float = 0.8, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.channels = channels
        self.mask = nn.Buffer(random_routing_mask(num_tasks, channels, beta, generator))

    def forward(self, t: Tensor) -> Tensor:
        """Masks, bool [N, C], of timesteps, integers [N]."""
        check_timesteps(t, len(self.mask))
        # Unsigned bytes would be taken for a mask.
        return self.mask[t.long()]

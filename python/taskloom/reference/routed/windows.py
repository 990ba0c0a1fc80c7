"""Windows of channels in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def window_mask(samples: int, channels: int, start: Tensor, width: int, widths: Tensor | None) -> Tensor:
    """Which channels of each sample are in its window, bool [N, C]: start to start + width - 1.

    start and widths are integers [N], or [] for every sample alike; without widths every window has ``width`` channels.
    """
    channel = torch.arange(channels, device=start.device)
    begin = start.long().reshape(-1, 1).expand(samples, 1)
    end = begin + (width if widths is None else widths.long().reshape(-1, 1))
    return (channel >= begin) & (channel < end)


def out_mask(samples: int, channels: int, start: Tensor | None, width: int, widths: Tensor | None, like: Tensor) -> Tensor:
    """The same of the outputs; all of them where no window was given."""
    if start is None:
        return torch.ones((samples, channels), dtype=torch.bool, device=like.device)
    return window_mask(samples, channels, start, width, widths)

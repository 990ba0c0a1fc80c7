"""A running mean of a model's weights, which is what diffusion models are sampled with."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


class Ema(Generic[Model]):
    """Exponential moving average of a model.

    Attributes
    ----------
    model
        A copy in evaluation mode that needs no gradient.

    Parameters
    ----------
    model
        What is trained; the average starts at it.
    decay
        Share of the average that an update keeps. The official code has 0.9999.
    """

    def __init__(self, model: Model, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected from 0 to below 1, got {decay}")
        self.decay = decay
        self.model: Model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: Model) -> None:
        """Move the average towards a model; buffers, such as the masks of R-TR, are copied."""
        mine, theirs = dict(self.model.named_parameters()), dict(model.named_parameters())
        torch._foreach_lerp_(list(mine.values()), [theirs[name] for name in mine], 1 - self.decay)
        buffers = dict(model.named_buffers())
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])

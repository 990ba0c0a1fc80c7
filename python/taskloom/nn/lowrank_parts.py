"""What an adapter of a layer is made of, and the names that a batch's adapters have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

# The name that means no adapter, in lists of a batch's adapters; PEFT's.
BASE = "__base__"

Tasks = Sequence[str] | Tensor


@dataclass(frozen=True)
class Settings:
    """What one adapter of a layer was made with."""

    r: int
    alpha: float
    use_rslora: bool
    use_dora: bool

    @property
    def scaling(self) -> float:
        """The constant factor of the product of the factors."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class Magnitude(nn.Module):
    """DoRA's norms; a module of their own, for PEFT's name of the parameter."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)

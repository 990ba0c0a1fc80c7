"""A gate of features: a mixture of low-rank maps that begins as the identity."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from taskloom.ops import lora_feature_gate


class FeatureGate(nn.Module):
    """Gate each feature of a row by a factor in (0, 2): ``x * sum_l softmax(x W)_l * 2 sigmoid((x down_l) up_l)``.

    Parameters
    ----------
    dim
        Features.
    rank
        Rank of each map.
    n_lora
        Maps. Default 2.

    Raises
    ------
    ValueError
        If a size is below 1.

    Attributes
    ----------
    down, up
        ``[n_lora, dim, rank]``, drawn as the weight of a torch.nn.Linear is, and ``[n_lora, rank, dim]``, zero: a new gate is the identity.
    mix
        The linear layer, without bias, whose softmax mixes the maps.

    Notes
    -----
    Source: HoME, arXiv 2408.05430. That ``up`` begins as zero is inferred. The weights of the maps are made to sum to exactly 1 where every
    map's gate is 1: the last one is what the others leave.
    """

    def __init__(
        self, dim: int, rank: int, n_lora: int = 2, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("rank", rank), ("n_lora", n_lora)):
            if size < 1:
                raise ValueError(f"FeatureGate: {name}: expected at least 1, got {size}")
        self.down = nn.Parameter(torch.empty(n_lora, dim, rank, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(n_lora, rank, dim, device=device, dtype=dtype))
        self.mix = nn.Linear(dim, n_lora, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make the gate the identity again."""
        bound = 1 / math.sqrt(self.down.shape[1])
        nn.init.uniform_(self.down, -bound, bound)
        nn.init.zeros_(self.up)
        self.mix.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, dim]`` from ``[B, dim]``."""
        said = self.mix(x)
        first = torch.softmax(said, 1, dtype=torch.promote_types(said.dtype, torch.float32))[:, :-1]
        weight = torch.cat([first, 1 - first.sum(1, keepdim=True)], 1)
        gated: Tensor = lora_feature_gate(x, self.down, self.up, weight)
        return gated

    def extra_repr(self) -> str:
        """The sizes, as in torch's own modules."""
        maps, dim, rank = self.down.shape
        return f"dim={dim}, rank={rank}, n_lora={maps}"

"""A gate of features made of low-rank maps: what each group of experts reads of an input."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from taskloom.ops import lora_feature_gate
from taskloom.ops._checks import check_floating


def _shares(logits: Tensor) -> Tensor:
    """The softmax; each share is at most, and the last exactly, what those before it leave of 1: added up in order they make exactly 1."""
    *first, last = torch.softmax(logits.float() if logits.dtype != torch.float64 else logits, -1).unbind(-1)
    total = torch.zeros_like(last)
    shares = []
    for share in first:
        # Rounded shares may come to more than 1, and the last one would be negative.
        shares.append(torch.minimum(share, 1 - total))
        total = total + shares[-1]
    return torch.stack([*shares, 1 - total], -1)


class FeatureGate(nn.Module):
    """Gate features: ``x * sum_l softmax(x W)_l * 2 sigmoid((x down_l) up_l)``, elementwise between 0 and 2.

    Parameters
    ----------
    dim
        Features D.
    rank
        Rank r of each map.
    n_lora
        Maps L.
    device, dtype
        As nn.Linear takes them.

    Raises
    ------
    ValueError
        If one of the three is below 1.

    Notes
    -----
    Parameters: ``down`` ``[L, D, r]``, ``up`` ``[L, r, D]`` and ``mix.weight`` ``[L, D]``. ``up`` starts at 0, so that the gate starts as
    the identity, exactly: the shares are made to add up to exactly 1.

    Source: HoME, arXiv 2408.05430. The factor 2 and the start at 0 are this library's reading of it.
    """

    def __init__(
        self, dim: int, rank: int, n_lora: int = 2, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("rank", rank), ("n_lora", n_lora)):
            if value < 1:
                raise ValueError(f"FeatureGate: {name}: expected at least 1, got {value}")
        self.dim, self.rank, self.n_lora = dim, rank, n_lora
        self.down = nn.Parameter(torch.empty(n_lora, dim, rank, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(n_lora, rank, dim, device=device, dtype=dtype))
        self.mix = nn.Linear(dim, n_lora, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw ``down`` and ``mix`` as nn.Linear does; set ``up`` to 0."""
        bound = 1 / math.sqrt(self.dim)
        nn.init.uniform_(self.down, -bound, bound)
        nn.init.zeros_(self.up)
        self.mix.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """The gated features of x ``[..., D]``, in its shape and dtype."""
        check_floating("FeatureGate", "x", x)
        if x.shape[-1:] != (self.dim,):
            raise ValueError(f"FeatureGate: x: expected {self.dim} features, got shape {tuple(x.shape)}")
        rows = x.reshape(-1, self.dim)
        return lora_feature_gate(rows, self.down, self.up, _shares(self.mix(rows))).reshape(x.shape)

    def extra_repr(self) -> str:
        """Features, rank and maps."""
        return f"{self.dim}, rank={self.rank}, n_lora={self.n_lora}"

"""Batch norms of several experts in one pass, with the activation behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from taskloom.ops import batch_norm_silu
from taskloom.ops.gating.batch_norm_silu import ACTIVATIONS


class StackedBatchNorm(nn.Module):
    """A torch.nn.BatchNorm1d for each of several experts, and an activation, in one pass over their stacked outputs.

    Parameters
    ----------
    n_experts, width
        As in the input, ``[B, n_experts, width]``.
    eps, momentum
        As in torch.nn.BatchNorm1d; the momentum is a number. Default 1e-5 and 0.1.
    activation
        ``"silu"`` (default), ``"relu"`` or None.

    Raises
    ------
    ValueError
        If a size is below 1 or the activation is unknown; in training, if a batch has one row.

    Attributes
    ----------
    weight, bias, running_mean, running_var
        ``[n_experts, width]``, an expert's in its row; ``num_batches_tracked`` as in torch's own.

    Notes
    -----
    Source: the experts of HoME, arXiv 2408.05430.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        n_experts: int,
        width: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        activation: str | None = "silu",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("n_experts", n_experts), ("width", width)):
            if size < 1:
                raise ValueError(f"StackedBatchNorm: {name}: expected at least 1, got {size}")
        if activation is not None and activation not in ACTIVATIONS:
            raise ValueError(f"StackedBatchNorm: activation: expected 'silu', 'relu' or None, got {activation!r}")
        self.eps, self.momentum, self.activation = eps, momentum, activation
        self.weight = nn.Parameter(torch.ones(n_experts, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(n_experts, width, device=device, dtype=dtype))
        self.register_buffer("running_mean", torch.zeros(n_experts, width, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(n_experts, width, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.int64, device=device))

    @classmethod
    def from_norms(cls, norms: Sequence[nn.BatchNorm1d], activation: str | None = "silu") -> Self:
        """The same norms as one module, with copies of their parameters and statistics.

        Parameters
        ----------
        norms
            One for each expert, of one width, eps and momentum, with parameters and running statistics.
        activation
            What follows them.

        Raises
        ------
        ValueError
            If they differ in these, or lack parameters or statistics.
        """
        alike = {(norm.num_features, norm.eps, norm.momentum) for norm in norms}
        if len(alike) != 1 or not all(norm.affine and norm.track_running_stats and norm.momentum is not None for norm in norms):
            raise ValueError(
                f"StackedBatchNorm: norms: expected norms of one width, eps and momentum with parameters and statistics, got {norms}"
            )
        width, eps, momentum = alike.pop()
        first = norms[0].weight
        stacked = cls(len(norms), width, eps, momentum or 0.0, activation, device=first.device, dtype=first.dtype)
        with torch.no_grad():
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(stacked, name).copy_(torch.stack([getattr(norm, name) for norm in norms]))
            stacked.num_batches_tracked.fill_(max(int(norm.num_batches_tracked or 0) for norm in norms))
        return stacked.train(norms[0].training)

    def reset_parameters(self) -> None:
        """Ones and zeros, and the statistics of no batch."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def forward(self, z: Tensor) -> Tensor:
        """The normalised and activated z, ``[B, n_experts, width]``."""
        y: Tensor = batch_norm_silu(
            z,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
            activation=self.activation,
        )
        if self.training:
            self.num_batches_tracked.add_(1)
        return y

    def extra_repr(self) -> str:
        """The sizes, as in torch's own modules."""
        experts, width = self.weight.shape
        return f"n_experts={experts}, width={width}, eps={self.eps}, momentum={self.momentum}, activation={self.activation!r}"

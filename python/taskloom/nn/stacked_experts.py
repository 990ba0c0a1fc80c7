"""Experts of the same shape as one module: one product for all of a layer, and a norm for each feature of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taskloom.ops import batch_norm_silu
from taskloom.ops._checks import check_floating

ACTIVATIONS = ("silu", "relu", None)
NORMS = ("batch", "layer", None)


def _check_activation(op: str, activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation: expected 'silu', 'relu' or None, got {activation!r}")


def _activated(x: Tensor, activation: str | None) -> Tensor:
    return x if activation is None else F.silu(x) if activation == "silu" else torch.relu(x)


def _requires_grad(norm: nn.BatchNorm1d) -> tuple[bool, bool]:
    return norm.weight.requires_grad, norm.bias.requires_grad


class StackedBatchNormSiLU(nn.Module):
    """Batch normalisation of E stacked experts and SiLU: one nn.BatchNorm1d for each expert, in one op.

    Parameters
    ----------
    num_experts, width
        E and D.
    eps, momentum, device, dtype
        As nn.BatchNorm1d takes them. Defaults 1e-5, 0.1.
    activation
        ``"silu"`` (default), ``"relu"`` or None.

    Notes
    -----
    Parameters and buffers have the names of nn.BatchNorm1d's, with a dimension of experts before: ``weight``, ``bias``, ``running_mean``
    and ``running_var`` are ``[E, D]``. :meth:`from_norms` and :meth:`norms` convert from and to a list of nn.BatchNorm1d.

    In training a batch has at least two rows: skip the call for a group of experts that no row of a batch is for, and its running
    statistics stay as they are. See :func:`taskloom.batch_norm_silu`.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_experts: int,
        width: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        activation: str | None = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_activation("StackedBatchNormSiLU", activation)
        self.num_experts, self.width, self.eps, self.momentum, self.activation = num_experts, width, eps, momentum, activation
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_experts, width, **like))
        self.bias = nn.Parameter(torch.empty(num_experts, width, **like))
        self.register_buffer("running_mean", torch.empty(num_experts, width, **like))
        self.register_buffer("running_var", torch.empty(num_experts, width, **like))
        self.register_buffer("num_batches_tracked", torch.empty((), dtype=torch.long, device=device))
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Set the running mean to 0, the running variance to 1, and the batches to none."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Set the factors to 1 and the addends to 0, and reset the running statistics."""
        self.reset_running_stats()
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    @classmethod
    def from_norms(cls, norms: Sequence[nn.BatchNorm1d], activation: str | None = "silu") -> StackedBatchNormSiLU:
        """Stack norms of experts, with copies of their parameters and statistics.

        Raises
        ------
        ValueError
            If there are none, or they differ in width, eps, momentum or what requires a gradient, or lack parameters or statistics; or if
            their momentum is None, which weighs batches by their number, and they have seen different numbers of batches.
        """
        if not norms:
            raise ValueError("StackedBatchNormSiLU: norms: expected at least one, got none")
        first = norms[0]
        for place, norm in enumerate(norms):
            if (norm.num_features, norm.eps, norm.momentum) != (first.num_features, first.eps, first.momentum):
                raise ValueError(
                    f"StackedBatchNormSiLU: norms[{place}]: expected width {first.num_features}, eps {first.eps} and momentum "
                    f"{first.momentum} as norms[0], got {norm.num_features}, {norm.eps} and {norm.momentum}"
                )
            if norm.weight is None or norm.running_mean is None:
                raise ValueError(f"StackedBatchNormSiLU: norms[{place}]: expected affine=True and track_running_stats=True")
            if _requires_grad(norm) != _requires_grad(first):
                raise ValueError(
                    f"StackedBatchNormSiLU: norms[{place}]: expected requires_grad of weight and bias {_requires_grad(first)} as "
                    f"norms[0], got {_requires_grad(norm)}"
                )
            if norm.momentum is None and norm.num_batches_tracked != first.num_batches_tracked:
                raise ValueError(
                    f"StackedBatchNormSiLU: norms[{place}]: expected num_batches_tracked {first.num_batches_tracked} as norms[0], where "
                    f"momentum is None, got {norm.num_batches_tracked}"
                )
        settings: dict[str, Any] = {"eps": first.eps, "momentum": first.momentum, "activation": activation}
        made = cls(len(norms), first.num_features, device=first.weight.device, dtype=first.weight.dtype, **settings)
        states = [norm.state_dict() for norm in norms]
        stacked = {name: torch.stack([state[name] for state in states]) for name in states[0] if name != "num_batches_tracked"}
        made.load_state_dict(stacked | {"num_batches_tracked": states[0]["num_batches_tracked"]})
        made.weight.requires_grad_(first.weight.requires_grad)
        made.bias.requires_grad_(first.bias.requires_grad)
        return made.train(first.training)

    def norms(self) -> list[nn.BatchNorm1d]:
        """Each expert's norm as torch's own, with copies of parameters and statistics."""
        found = []
        for expert in range(self.num_experts):
            norm = nn.BatchNorm1d(self.width, self.eps, self.momentum, device=self.weight.device, dtype=self.weight.dtype)
            state = self.state_dict()
            norm.load_state_dict({name: value if value.dim() == 0 else value[expert] for name, value in state.items()})
            norm.weight.requires_grad_(self.weight.requires_grad)
            norm.bias.requires_grad_(self.bias.requires_grad)
            found.append(norm.train(self.training))
        return found

    def forward(self, z: Tensor) -> Tensor:
        """The outputs z ``[B, E, D]`` of the experts, normalised and activated."""
        if z.dim() != 3 or z.shape[1:] != (self.num_experts, self.width):
            raise ValueError(f"StackedBatchNormSiLU: z: expected shape [B, {self.num_experts}, {self.width}], got {tuple(z.shape)}")
        momentum = self.momentum
        if momentum is None:
            momentum = 1 / (float(self.num_batches_tracked) + 1) if self.training else 0.0
        y = batch_norm_silu(
            z,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            training=self.training,
            momentum=momentum,
            eps=self.eps,
            activation=self.activation,
        )
        if self.training:
            self.num_batches_tracked.add_(1)
        return y

    def extra_repr(self) -> str:
        """Experts, width and what is not the default."""
        return f"{self.num_experts}, {self.width}, eps={self.eps}, momentum={self.momentum}, activation={self.activation!r}"


class _StackedLayerNorm(nn.Module):
    """Layer normalisation of each expert's features, with factors and addends of its own."""

    def __init__(self, num_experts: int, width: int, activation: str | None, like: dict[str, Any]) -> None:
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(num_experts, width, **like))
        self.bias = nn.Parameter(torch.empty(num_experts, width, **like))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the factors to 1 and the addends to 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, z: Tensor) -> Tensor:
        return _activated(torch.addcmul(self.bias, F.layer_norm(z, z.shape[-1:]), self.weight), self.activation)


class _StackedLinear(nn.Module):
    """A linear layer of each expert: ``weight`` ``[E, out, in]``, ``bias`` ``[E, out]``, as nn.Linear's of the experts stacked."""

    def __init__(self, num_experts: int, in_features: int, out_features: int, bias: bool, like: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, **like))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features, **like)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both as nn.Linear does: uniform within 1 / sqrt(inputs)."""
        bound = 1 / math.sqrt(self.weight.shape[2])
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """All experts' outputs ``[B, E, out]`` of x ``[B, in]``, one product; or of inputs of their own, ``[B, E, in]``."""
        experts, width, _ = self.weight.shape
        if x.dim() == 2:
            bias = None if self.bias is None else self.bias.flatten()
            return F.linear(x, self.weight.flatten(0, 1), bias).reshape(-1, experts, width)
        by_expert, factors = x.transpose(0, 1), self.weight.transpose(1, 2)
        z = torch.bmm(by_expert, factors) if self.bias is None else torch.baddbmm(self.bias[:, None], by_expert, factors)
        return z.transpose(0, 1)


class StackedExperts(nn.Module):
    """Experts of one shape, ``act(norm(MLP(x)))``, as one module: one product a layer for all of them, and one norm.

    Parameters
    ----------
    num_experts, in_features, out_features
        E, and the widths of the input and of an expert's output.
    hidden
        Widths of hidden layers, each with the activation behind it. Default: none.
    norm
        ``"batch"`` (default): batch normalisation of each feature of each expert (:class:`StackedBatchNormSiLU`); ``"layer"``: layer
        normalisation of each expert's features; None.
    activation
        ``"silu"`` (default), ``"relu"`` or None: behind the norm, and behind hidden layers.
    bias
        Whether the linear layers have one. Default True.
    device, dtype
        As nn.Linear takes them.

    Raises
    ------
    ValueError
        If a width or the number of experts is below 1, or the norm or the activation is unknown.

    Notes
    -----
    ``layers[i].weight`` is ``[E, out, in]`` and ``layers[i].bias`` ``[E, out]``: the experts' nn.Linear parameters stacked. With a norm of
    None and ``"relu"`` they are the usual experts.

    Source: the experts of HoME, arXiv 2408.05430, whose output is normalised and then activated.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        hidden: Sequence[int] = (),
        *,
        norm: str | None = "batch",
        activation: str | None = "silu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_activation("StackedExperts", activation)
        if norm not in NORMS:
            raise ValueError(f"StackedExperts: norm: expected 'batch', 'layer' or None, got {norm!r}")
        widths = [in_features, *hidden, out_features]
        if min(num_experts, *widths) < 1:
            raise ValueError(f"StackedExperts: expected at least one expert and widths of at least 1, got {num_experts} and {widths}")
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_experts, self.in_features, self.activation = num_experts, in_features, activation
        self.layers = nn.ModuleList(_StackedLinear(num_experts, a, b, bias, like) for a, b in pairwise(widths))
        self.norm: nn.Module | None = None
        if norm == "batch":
            self.norm = StackedBatchNormSiLU(num_experts, out_features, activation=activation, **like)
        elif norm == "layer":
            self.norm = _StackedLayerNorm(num_experts, out_features, activation, like)

    def reset_parameters(self) -> None:
        """Draw the layers anew, and reset the norm."""
        for module in (*self.layers, self.norm):
            if module is not None:
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Each expert's output, ``[B, E, out]``, of an input for all, ``[B, in]``, or one for each, ``[B, E, in]``."""
        check_floating("StackedExperts", "x", x)
        experts, width = self.num_experts, self.in_features
        if tuple(x.shape[1:]) not in ((width,), (experts, width)):
            raise ValueError(f"StackedExperts: x: expected shape [B, {width}] or [B, {experts}, {width}], got {tuple(x.shape)}")
        for place, layer in enumerate(self.layers):
            x = layer(x if place == 0 else _activated(x, self.activation))
        found: Tensor = _activated(x, self.activation) if self.norm is None else self.norm(x)
        return found

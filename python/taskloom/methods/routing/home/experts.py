"""Experts whose outputs are normalised and then activated, stacked so that a pool of them is a few products and one norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taskloom.nn import FeatureGate, StackedBatchNorm

NORMS = ("batch", "layer", None)
ACTIVATIONS = ("silu", "relu")
MOST_RANK = 64


def check_choice(module: str, name: str, value: object, allowed: Sequence[object]) -> None:
    """Refuse a value that is none of those allowed."""
    if value not in allowed:
        raise ValueError(f"{module}: {name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_sizes(module: str, **sizes: int) -> None:
    """Refuse sizes below 1 and what is no integer."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{module}: {name}: expected an integer, got {size!r}")
        if size < 1:
            raise ValueError(f"{module}: {name}: expected at least 1, got {size}")


class StackedMLP(nn.Module):
    """The multilayer perceptrons of several experts of one input: linear layers with an activation between them, none behind the last.

    The first layer of all of them is one matrix product, and each later layer one batched product.

    Parameters
    ----------
    n_experts
        Their number.
    in_dim, out_dim, hidden
        Features of the input, of the output and of the layers between.
    activation
        ``"silu"`` or ``"relu"``, between layers.
    """

    def __init__(self, n_experts: int, in_dim: int, out_dim: int, hidden: Sequence[int] = (), activation: str = "silu") -> None:
        super().__init__()
        self.activation: Callable[[Tensor], Tensor] = F.silu if activation == "silu" else F.relu
        sizes = list(pairwise((in_dim, *hidden, out_dim)))
        self.weights = nn.ParameterList(torch.empty(n_experts, inner, outer) for inner, outer in sizes)
        self.biases = nn.ParameterList(torch.empty(n_experts, outer) for _, outer in sizes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each expert's layers as torch.nn.Linear does."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            bound = 1 / math.sqrt(weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, n_experts, out_dim]`` from ``[B, in_dim]``."""
        weights, biases = list(self.weights), list(self.biases)
        experts, _, width = weights[0].shape
        z: Tensor = F.linear(x, weights[0].transpose(1, 2).reshape(experts * width, -1), biases[0].flatten()).unflatten(1, (experts, width))
        for weight, bias in zip(weights[1:], biases[1:], strict=True):
            z = torch.baddbmm(bias[:, None], self.activation(z).transpose(0, 1), weight).transpose(0, 1)
        return z


class ExpertNorm(nn.Module):
    """What follows the last linear layer of stacked experts: a norm of each expert's own features, and an activation.

    Parameters
    ----------
    n_experts, width
        As in the input, ``[B, n_experts, width]``.
    norm
        ``"batch"``: each feature of each expert over the batch; ``"layer"``: each expert's features of a row; None: no norm.
    activation
        ``"silu"`` or ``"relu"``.
    """

    def __init__(self, n_experts: int, width: int, norm: str | None = "batch", activation: str = "silu", eps: float = 1e-5) -> None:
        super().__init__()
        self.eps, self.width = eps, width
        self.activation: Callable[[Tensor], Tensor] = F.silu if activation == "silu" else F.relu
        self.batch = StackedBatchNorm(n_experts, width, eps=eps, activation=activation) if norm == "batch" else None
        self.weight = nn.Parameter(torch.ones(n_experts, width)) if norm == "layer" else None
        self.bias = nn.Parameter(torch.zeros(n_experts, width)) if norm == "layer" else None

    def forward(self, z: Tensor) -> Tensor:
        """The normalised and activated z, in its shape."""
        if self.batch is not None:
            found: Tensor = self.batch(z)
            return found
        if self.weight is not None and self.bias is not None:
            z = F.layer_norm(z, (self.width,), eps=self.eps) * self.weight + self.bias
        return self.activation(z)


class HoMEExpert(nn.Module):
    """One expert: ``activation(norm(MLP(x)))``; there is no ReLU between the last linear layer and the norm.

    Parameters
    ----------
    in_dim, out_dim, hidden
        Features of the input, of the output and of the layers between. Default: no layers between.
    norm
        ``"batch"`` (default), ``"layer"`` or None.
    activation
        ``"silu"`` (default) or ``"relu"``. With ``norm=None`` and ``"relu"`` it is the expert of the baselines.

    Raises
    ------
    ValueError
        If a size is below 1, or norm or activation is unknown; in training with a batch norm, if the batch has one row.

    Notes
    -----
    Source: HoME, arXiv 2408.05430. That several layers have the activation between them is inferred.
    """

    def __init__(self, in_dim: int, out_dim: int, hidden: Sequence[int] = (), norm: str | None = "batch", activation: str = "silu") -> None:
        super().__init__()
        check_sizes("HoMEExpert", in_dim=in_dim, out_dim=out_dim, **{f"hidden[{place}]": size for place, size in enumerate(hidden)})
        check_choice("HoMEExpert", "norm", norm, NORMS)
        check_choice("HoMEExpert", "activation", activation, ACTIVATIONS)
        self.mlp = StackedMLP(1, in_dim, out_dim, hidden, activation)
        self.norm = ExpertNorm(1, out_dim, norm, activation)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, out_dim]`` from ``[B, in_dim]``."""
        found: Tensor = self.norm(self.mlp(x))[:, 0]
        return found


class ExpertPool(nn.Module):
    """All experts of one level, in groups of one input each; their outputs side by side are what gates read.

    Parameters
    ----------
    groups
        The number of experts of each group, by the group's name, in the order of the outputs.
    in_dim, out_dim, hidden, norm, activation
        As in :class:`HoMEExpert`.
    feature_gate
        Whether each group's experts read ``x * FG(x)`` with a feature gate of the group's own.
    n_lora, rank
        Maps of a feature gate, and their rank; default None: ``in_dim // n_lora``, at least 1 and at most 64 (the cap is inferred).

    Raises
    ------
    ValueError
        If there is no group, a size is below 1, or norm or activation is unknown.
    """

    def __init__(
        self,
        groups: Mapping[str, int],
        in_dim: int,
        out_dim: int,
        hidden: Sequence[int] = (),
        *,
        norm: str | None = "batch",
        activation: str = "silu",
        feature_gate: bool = False,
        n_lora: int = 2,
        rank: int | None = None,
    ) -> None:
        super().__init__()
        if not groups:
            raise ValueError("ExpertPool: groups: expected at least one group of experts, got none")
        check_sizes("ExpertPool", in_dim=in_dim, out_dim=out_dim, **{f"groups[{name!r}]": size for name, size in groups.items()})
        check_choice("ExpertPool", "norm", norm, NORMS)
        check_choice("ExpertPool", "activation", activation, ACTIVATIONS)
        self.groups, self.n_experts = dict(groups), sum(groups.values())
        self.mlps = nn.ModuleList(StackedMLP(size, in_dim, out_dim, hidden, activation) for size in groups.values())
        self.norm = ExpertNorm(self.n_experts, out_dim, norm, activation)
        self.gates: nn.ModuleList | None = None
        if feature_gate:
            check_sizes("ExpertPool", n_lora=n_lora)
            chosen = max(1, min(MOST_RANK, in_dim // n_lora)) if rank is None else rank
            self.gates = nn.ModuleList(FeatureGate(in_dim, chosen, n_lora) for _ in groups)

    def columns(self, group: str) -> slice:
        """Where a group's experts are among the outputs."""
        sizes = list(self.groups.values())
        place = list(self.groups).index(group)
        return slice(sum(sizes[:place]), sum(sizes[: place + 1]))

    def mask(self, gates: Sequence[Sequence[str]]) -> Tensor:
        """Which experts each gate may read, ``[gates, experts]``, from the names of the groups that it reads."""
        mask = torch.zeros(len(gates), self.n_experts, dtype=torch.bool)
        for row, names in zip(mask, gates, strict=True):
            for name in names:
                row[self.columns(name)] = True
        return mask

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """The outputs of all experts.

        Parameters
        ----------
        inputs
            ``[B, in_dim]`` for each group.

        Returns
        -------
        Tensor
            ``[B, n_experts, out_dim]``.
        """
        if self.gates is not None:
            inputs = [gate(x) for gate, x in zip(self.gates, inputs, strict=True)]
        found: Tensor = self.norm(torch.cat([mlp(x) for mlp, x in zip(self.mlps, inputs, strict=True)], 1))
        return found

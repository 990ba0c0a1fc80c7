"""Experts whose outputs are normalised and then activated, and pools of them in groups of one input each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from taskloom.nn import FeatureGate, StackedExperts, stacked_experts
from taskloom.nn.multi_gate import check_sizes

ACTIVATIONS = tuple(name for name in stacked_experts.ACTIVATIONS if name is not None)
MOST_RANK = 64


def check_choice(module: str, name: str, value: object, allowed: Sequence[object]) -> None:
    """Refuse a value that is none of those allowed."""
    if value not in allowed:
        raise ValueError(f"{module}: {name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


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
        check_choice("HoMEExpert", "norm", norm, stacked_experts.NORMS)
        check_choice("HoMEExpert", "activation", activation, ACTIVATIONS)
        self.stacked = StackedExperts(1, in_dim, out_dim, hidden, norm=norm, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, out_dim]`` from ``[B, in_dim]``."""
        found: Tensor = self.stacked(x)[:, 0]
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
        check_choice("ExpertPool", "norm", norm, stacked_experts.NORMS)
        check_choice("ExpertPool", "activation", activation, ACTIVATIONS)
        self.groups, self.n_experts = dict(groups), sum(groups.values())
        self.experts = nn.ModuleList(
            StackedExperts(size, in_dim, out_dim, hidden, norm=norm, activation=activation) for size in groups.values()
        )
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
        """Which experts each gate may read, ``[gates, experts]`` on the CPU, from the names of the groups that it reads."""
        mask = torch.zeros(len(gates), self.n_experts, dtype=torch.bool, device="cpu")
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
        return torch.cat([experts(x) for experts, x in zip(self.experts, inputs, strict=True)], 1)

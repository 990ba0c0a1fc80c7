"""The claim's data, instructions with a rule each, and its model, a residual MLP of sparse layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, layer_norm, normalize

from taskloom.nn import TopKRouter
from taskloom.ops import load_balance_loss


@dataclass(frozen=True)
class Rows:
    """Samples: inputs [N, D], classes [N], and embeddings [N, F] of their instructions."""

    x: Tensor
    y: Tensor
    emb: Tensor

    def batch(self, rows: Tensor | None = None) -> dict[str, Tensor]:
        """What a model is called with for some rows, or for all."""
        return {"x": self.x, "y": self.y} if rows is None else {"x": self.x[rows], "y": self.y[rows]}

    def to(self, device: torch.device) -> Rows:
        """The same on another device."""
        return Rows(self.x.to(device), self.y.to(device), self.emb.to(device))


class Instructions:
    """Tasks: each has an instruction, which the model sees with noise, an embedding, and a linear rule for the classes.

    Parameters
    ----------
    config
        The claim's settings.
    generator
        What the tasks are drawn with.
    """

    def __init__(self, config: Mapping[str, Any], generator: torch.Generator) -> None:
        tasks, self._config = config["instructions"], config
        self._seen = torch.randn(tasks, config["seen"], generator=generator)
        self._embedded = normalize(torch.randn(tasks, config["embedding"], generator=generator), dim=1)
        self._rules = torch.randn(tasks, config["features"], config["classes"], generator=generator)

    def draw(self, count: int, generator: torch.Generator) -> Rows:
        """So many samples of random tasks."""
        config = self._config
        task = torch.randint(len(self._seen), (count,), generator=generator)
        features = torch.randn(count, config["features"], generator=generator)
        seen = self._seen[task] + config["seen_noise"] * torch.randn(count, config["seen"], generator=generator)
        scores = (features.unsqueeze(1) @ self._rules[task]).squeeze(1)
        scores = scores + config["rule_noise"] * torch.randn(count, config["classes"], generator=generator)
        noise = config["embedding_noise"] * torch.randn(count, config["embedding"], generator=generator)
        return Rows(torch.cat([seen, features], 1), scores.argmax(1), normalize(self._embedded[task] + noise, dim=1))


class Prediction(NamedTuple):
    """The classes' logits ``[B, C]``, the mean balance of the layers, and the loss or None."""

    logits: Tensor
    balance: Tensor
    loss: Tensor | None


class _Experts(nn.Module):
    """E small MLPs, each computed for all rows: at this size cheaper than moving rows to their experts."""

    def __init__(self, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, width, hidden) / math.sqrt(width))
        self.down = nn.Parameter(torch.randn(experts, hidden, width) / math.sqrt(hidden))

    def forward(self, x: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
        y = gelu(x @ self.up) @ self.down
        rows = torch.arange(len(x), device=x.device)
        return (y[ids.T, rows] * weight.T.unsqueeze(-1)).sum(0)


class _SparseLayer(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, experts = config["width"], config["experts"]
        self.gate = TopKRouter(width, experts, config["k"], renormalize=True, ids_dtype=torch.int64)
        self.experts = _Experts(experts, width, config["hidden"])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's output, and its balance: 1 where every expert has the same load."""
        normed = layer_norm(x, x.shape[1:])
        gate = self.gate(normed, statistics=True)
        balance = load_balance_loss(gate.counts, gate.prob_sum, len(x), gate.ids.shape[1])
        return x + self.experts(normed, gate.ids, gate.weight), balance


class SparseMLP(nn.Module):
    """A residual MLP of sparse layers; ``layers`` have a gate and experts each."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.first = nn.Linear(config["seen"] + config["features"], config["width"])
        self.layers = nn.ModuleList(_SparseLayer(config) for _ in range(config["layers"]))
        self.last = nn.Linear(config["width"], config["classes"])

    def forward(self, x: Tensor, y: Tensor | None = None) -> Prediction:
        """What the model says of rows ``[B, D]``, and the loss where their classes ``[B]`` are given."""
        x = self.first(x)
        balances = []
        for layer in self.layers:
            x, balance = layer(x)
            balances.append(balance)
        logits = self.last(layer_norm(x, x.shape[1:]))
        return Prediction(logits, torch.stack(balances).mean(), None if y is None else cross_entropy(logits, y))

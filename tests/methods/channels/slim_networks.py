"""A small network of two tasks for the tests of controllable_mtl, plain or of slim layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from taskloom.methods.channels.controllable_mtl import SlimConv2d, SlimLinear, SlimMultiTask, SlimNorm2d

OUTPUTS = {"a": 5, "b": 7}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X = normal(4, 3, 8, 8)
TARGETS = {"a": torch.tensor([0, 1, 2, 3]), "b": torch.tensor([6, 5, 4, 3])}


def _encoder(kind: str | None) -> nn.Sequential:
    norm = [] if kind is None else [SlimNorm2d(16, kind, groups=4 if kind == "group" else 1, relu=True)]
    return nn.Sequential(
        SlimConv2d(3, 16, 3, padding=1),
        *norm,
        SlimConv2d(16, 16, 3, padding=1, groups=16),
        nn.ReLU(),
        SlimConv2d(16, 32, 3, stride=2),
        nn.ReLU(),
    )


def _decoder(outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), SlimLinear(32 * 9, 32), nn.ReLU(), SlimLinear(32, outputs, slim_output=False))


def slim_network(kind: str | None = None, tasks: Sequence[str] = ("a", "b")) -> SlimMultiTask:
    """The same weights for the same kind, whatever the order of the tasks; ``kind`` is that of a normalisation, None for none."""
    torch.manual_seed(0)
    encoder = _encoder(kind)
    decoders = {task: _decoder(outputs) for task, outputs in OUTPUTS.items()}
    return SlimMultiTask(encoder, {task: decoders[task] for task in tasks})


class PlainNetwork(nn.Module):
    """What :func:`slim_network` is at full width, without a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2),
            nn.ReLU(),
        )
        self.decoders = nn.ModuleDict(
            {task: nn.Sequential(nn.Flatten(), nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, outputs)) for task, outputs in OUTPUTS.items()}
        )


class Staged(nn.Module):
    """An encoder that gives the features of two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = SlimConv2d(3, 16, 3, stride=2), SlimConv2d(16, 16, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.first(x).relu()
        return [z, self.second(z)]


class Pooled(nn.Module):
    """A decoder of both stages."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = SlimLinear(16, 16), SlimLinear(16, 3, slim_output=False)

    def forward(self, z: list[Tensor]) -> Tensor:
        pooled = z[0].mean((2, 3)) + z[1].mean((2, 3))
        return self.head(self.hidden(pooled).relu())


def staged_network() -> SlimMultiTask:
    torch.manual_seed(0)
    return SlimMultiTask(Staged(), {"a": Pooled(), "b": Pooled()})

"""Small models for the tests of modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from taskloom.nn import SlimConv2d, SlimLinear, SlimNorm2d


class Attention(nn.Module):
    """As timm's: one linear layer for queries, keys and values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(torch.softmax(q @ k.mT, -1) @ v)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn, self.norm = Attention(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 2 * width), "fc2": nn.Linear(2 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp["fc2"](torch.relu(self.mlp["fc1"](x)))


class Transformer(nn.Module):
    """Two blocks and a classifier, from the same weights for the same seed."""

    def __init__(self, width: int = 12, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def randomise(model: nn.Module, seed: int = 1) -> None:
    """Random values for every adapter's parameters, so that B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                scale = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(scale.abs() + 1 if "magnitude" in name else scale)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class SlimNet(nn.Module):
    """An encoder and two decoders, whose inputs are flattened features."""

    def __init__(self, kind: str = "layer", seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        groups = 4 if kind == "group" else 1
        self.encoder = nn.Sequential(
            SlimConv2d(3, 16, 3, padding=1, bias=False),
            SlimNorm2d(16, kind, groups=groups, relu=True),
            SlimConv2d(16, 16, 3, padding=1, groups=16),
            SlimConv2d(16, 32, 3, stride=2, padding="valid"),
            SlimNorm2d(32, kind, groups=2 * groups if kind == "group" else 1),
            nn.ReLU(),
        )
        self.decoders = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Flatten(), SlimLinear(32 * 9, 24), nn.ReLU(), SlimLinear(24, outputs, slim_output=False))
                for name, outputs in (("a", 5), ("b", 7))
            }
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.encoder(x)
        return {name: decoder(z) for name, decoder in self.decoders.items()}

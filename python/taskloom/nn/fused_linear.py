"""A fused linear layer, such as timm's qkv, taken apart so that each part can have an adapter of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def _part(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    part = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    part.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        part.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return part


class SplitLinear(nn.Module):
    """Several linear layers in the place of one: their outputs, one after the other.

    Parameters
    ----------
    fused
        The layer to take apart, whose outputs divide evenly among the parts. Weights are copied.
    names
        The names of the parts, which become submodules. Default ``("q", "k", "v")``.

    Raises
    ------
    ValueError
        If the outputs do not divide among the parts, or two parts have one name.
    """

    def __init__(self, fused: nn.Linear, names: Sequence[str] = ("q", "k", "v")) -> None:
        super().__init__()
        if len(set(names)) != len(names):
            raise ValueError(f"names: expected each once, got {', '.join(map(repr, names))}")
        if not names or fused.out_features % len(names):
            raise ValueError(f"names: {fused.out_features} outputs do not divide among {len(names)} parts")
        self.names = tuple(names)
        biases = [None] * len(names) if fused.bias is None else list(fused.bias.chunk(len(names)))
        for name, weight, bias in zip(names, fused.weight.chunk(len(names)), biases, strict=True):
            self.add_module(name, _part(weight, bias))
        # Layers that take the place of a part look at it for their own mode.
        self.train(fused.training)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs ``[..., out]`` of x ``[..., in]``."""
        return torch.cat([getattr(self, name)(x) for name in self.names], -1)

    def fuse(self) -> nn.Linear:
        """One layer again, from the parts' weights; parts that are adapted have to be merged and taken out first.

        Raises
        ------
        TypeError
            If a part is no plain ``nn.Linear``.
        """
        parts = [getattr(self, name) for name in self.names]
        for name, part in zip(self.names, parts, strict=True):
            if type(part) is not nn.Linear:
                raise TypeError(f"{name}: expected nn.Linear, got {type(part).__name__}; merge its adapters and put its base layer back")
        weight = torch.cat([part.weight for part in parts])
        fused = _part(weight, None if parts[0].bias is None else torch.cat([part.bias for part in parts]))
        return fused.train(self.training)


def split_fused(model: nn.Module, target: str = "qkv", names: Sequence[str] = ("q", "k", "v")) -> list[str]:
    """Take every fused linear layer of a name apart, in place.

    Parameters
    ----------
    model
        timm's vision transformers have ``blocks.N.attn.qkv``.
    target
        The layer's own name, the last part of its path. Default ``"qkv"``.
    names
        The names of the parts: ``blocks.N.attn.qkv.q`` and so on.

    Returns
    -------
    list of str
        The paths of the layers that were taken apart; none where there are none.

    Raises
    ------
    TypeError
        If a module of that name is no ``nn.Linear``.
    ValueError
        If outputs do not divide among the parts. Nothing is changed then.
    """
    found = [(path, module) for path, module in model.named_modules() if path.rpartition(".")[2] == target]
    made = []
    for path, module in found:
        if isinstance(module, SplitLinear):
            continue
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{path}: expected nn.Linear, got {type(module).__name__}")
        made.append((path, SplitLinear(module, names)))
    for path, split in made:
        parent, _, own = path.rpartition(".")
        setattr(model.get_submodule(parent), own, split)
    return [path for path, _ in made]

"""Small fine-tunings with odd sizes, a scalar, an empty tensor, bfloat16 or float64 where asked, and an integer buffer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

State = dict[str, Tensor]

SHAPES = {"embed.weight": (13, 5), "layers.0.w/q": (7, 3), "norm": (9,), "scale": (), "none": (0, 4)}


def make_base(dtype: torch.dtype = torch.float32) -> State:
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return state | {"position_ids": torch.arange(6)}


def make_tuned(base: State, seed: int, dtype: torch.dtype | None = None, share: float = 1.0) -> State:
    """The base, moved by noise in a share of its entries."""
    generator = torch.Generator().manual_seed(1000 + seed)
    tuned = {}
    for name, values in base.items():
        noise = 0.1 * torch.randn(values.shape, generator=generator) * (torch.rand(values.shape, generator=generator) < share)
        floating = values.is_floating_point()
        tuned[name] = (
            (values.to(torch.promote_types(values.dtype, torch.float32)) + noise).to(dtype or values.dtype) if floating else values.clone()
        )
    return tuned


def make_models(tasks: int = 3, dtype: torch.dtype = torch.float32, share: float = 1.0) -> tuple[State, dict[str, State]]:
    base = make_base(dtype)
    return base, {f"task-{number}": make_tuned(base, number, share=share) for number in range(tasks)}


def grid_models(tasks: int = 4, shift: float = 0.0) -> tuple[State, dict[str, State]]:
    """Changes of few values: equal magnitudes across tensors, and votes of exactly zero; the base is zero."""
    base = {name: torch.zeros_like(values) if values.is_floating_point() else values for name, values in make_base().items()}
    generator = torch.Generator().manual_seed(5)
    tuned = {}
    for number in range(tasks):
        tuned[f"task-{number}"] = {
            name: torch.randint(-2, 3, values.shape, generator=generator) + shift if values.is_floating_point() else values.clone()
            for name, values in base.items()
        }
    return base, tuned


def floats(state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The floating-point tensors as numpy's, float32 but where they are float64."""
    return {
        name: values.to(torch.promote_types(values.dtype, torch.float32)).numpy()
        for name, values in state.items()
        if values.is_floating_point()
    }


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two states have the same names, dtypes and bits."""
    return list(left) == list(right) and all(
        left[name].dtype == right[name].dtype
        and torch.equal(left[name].reshape(-1).view(torch.uint8), right[name].reshape(-1).view(torch.uint8))
        for name in left
    )


class Toy(nn.Module):
    """A module with the states' tensors and a head of its own."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 5, dtype=dtype)
        self.norm = nn.Parameter(torch.zeros(9, dtype=dtype))
        self.scale = nn.Parameter(torch.zeros((), dtype=dtype))
        self.register_buffer("position_ids", torch.zeros(6, dtype=torch.int64))
        self.head = nn.Linear(5, 2, dtype=dtype)


TOY = ("embed.weight", "norm", "scale", "position_ids")


def toy_models(tasks: int = 3, dtype: torch.dtype = torch.float32) -> tuple[State, dict[str, State]]:
    """The models whose tensors :class:`Toy` has."""
    base, tuned = make_models(tasks, dtype)
    return {name: base[name] for name in TOY}, {task: {name: state[name] for name in TOY} for task, state in tuned.items()}

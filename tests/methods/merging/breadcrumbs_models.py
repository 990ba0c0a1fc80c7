"""Small models for the tests of Model Breadcrumbs, and its formula by sorting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

State = dict[str, Tensor]

SHAPES: dict[str, tuple[int, ...]] = {
    "model.layers.0.mlp.weight": (37, 53),
    "model.layers.0.conv.weight": (5, 4, 2, 3),
    "model.layers.1.mlp.weight": (1, 1025),
    "model.norm.bias": (64,),
    "model.scale": (),
    "model.empty": (0, 4),
}
FLOAT_NAMES = list(SHAPES)
STEPS = "model.steps"


def models(count: int = 3, dtype: torch.dtype = torch.float32, tied: bool = False, seed: int = 0) -> tuple[State, list[State]]:
    """A base and fine-tunings of it with an integer buffer each; ``tied`` makes many magnitudes equal, and none zero."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=generator)
        return (values * 4).round() / 4 + torch.where(values < 0, -0.125, 0.125) if tied else values

    base: State = {name: drawn(shape).to(dtype) for name, shape in SHAPES.items()}
    tuned: list[State] = [{name: (value.float() + drawn(SHAPES[name])).to(dtype) for name, value in base.items()} for _ in range(count)]
    for steps, state in enumerate((base, *tuned)):
        state[STEPS] = torch.tensor([steps, 7])
    return base, tuned


def sorted_mask(delta: Tensor, begin: int, end: int, row: bool = False) -> Tensor:
    """The ranks begin .. end of each segment by a stable sort, so of equal magnitudes the lower index ranks higher."""
    segments = delta.abs().reshape(-1, delta.shape[-1]) if row else delta.abs().reshape(1, -1)
    order = segments.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(segments, dtype=torch.bool).scatter_(1, order[:, begin:end], True).reshape(delta.shape)


def by_formula(base: Tensor, tuned: Sequence[Tensor], masks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``base + sum_t w_t * mask_t * delta_t`` in float32, in this order, rounded once."""
    origin = base.float()
    total = torch.zeros_like(origin)
    for tensor, mask, weight in zip(tuned, masks, weights, strict=True):
        total = total + torch.tensor(weight) * torch.where(mask, tensor.float() - origin, 0)
    return (origin + total).to(base.dtype)


def assert_same_bits(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise unless two state dicts have the same names, dtypes, shapes and bits."""
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(got[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name

"""Rows of lora_feature_gate: a batch through two maps of rank 64 at most, as HoME gates what a group of experts reads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import taskloom
from harness import Contest, Row, Shape
from inputs import total_bytes, weights
from taskloom.ops.gating import lora_feature_gate_backward

BATCH = (4096, 512)
MAPS, MOST_RANK = 2, 64
# Sums over the whole batch.
TOLERANCE = 1e-5

Form = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def all_maps(x: Tensor, down: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """The formula in torch eager, which stores [B, L, D]."""
    maps = 2 * torch.sigmoid(torch.einsum("blr,lrd->bld", torch.einsum("bd,ldr->blr", x, down), up))
    return x * torch.einsum("bl,bld->bd", weight, maps)


def map_by_map(x: Tensor, down: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """The same in a loop over maps."""
    total = torch.zeros_like(x)
    for place in range(len(down)):
        total = total + weight[:, place, None] * (2 * torch.sigmoid((x @ down[place]) @ up[place]))
    return x * total


FORMS: dict[str, Form] = {"all maps": all_maps, "map by map": map_by_map}


def _given(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, features = shape
    rank = max(1, min(MOST_RANK, features // MAPS))
    down = weights((MAPS * features, rank), 1).reshape(MAPS, features, rank) * features**-0.5
    up = weights((MAPS * rank, features), 2).reshape(MAPS, rank, features) * rank**-0.5
    return weights(shape, 0, dtype), down.to(dtype), up.to(dtype), weights((rows, MAPS), 3).softmax(1).to(dtype)


def _sizes(down: Tensor) -> dict[str, float]:
    return {"maps": down.shape[0], "rank": down.shape[2]}


def _forward(shape: Shape, dtype: torch.dtype) -> Contest:
    given = _given(shape, dtype)
    peers = {name: partial(form, *given) for name, form in FORMS.items()}
    return Contest(partial(taskloom.lora_feature_gate, *given), 2 * given[0].nbytes, peers, sizes=_sizes(given[1]), tolerance=TOLERANCE)


def _backward(shape: Shape, dtype: torch.dtype) -> Contest:
    given, gradient = _given(shape, dtype), weights(shape, 4, dtype)
    leaves = [one.clone().requires_grad_() for one in given]
    inner = torch.ops.taskloom.lora_feature_gate.default(*given)[1]
    results = {name: form(*leaves) for name, form in FORMS.items()}
    peers = {
        f"backward of {name}": partial(torch.autograd.grad, result, leaves, gradient, retain_graph=True) for name, result in results.items()
    }
    ours = partial(lora_feature_gate_backward, gradient, *given, inner)
    return Contest(ours, 3 * given[0].nbytes + total_bytes(inner), peers, sizes=_sizes(given[1]), tolerance=TOLERANCE)


ROWS = (
    Row("lora_feature_gate", _forward, "", (torch.float32,), BATCH, memory=True),
    Row("lora_feature_gate_backward", _backward, "", (torch.float32,), BATCH, memory=True),
)

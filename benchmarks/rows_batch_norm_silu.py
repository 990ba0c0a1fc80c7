"""Rows of batch_norm_silu: a batch of twelve experts, as many as the shape's width makes at 256 features, in training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import taskloom
from harness import Contest, Row, Shape
from inputs import total_bytes, weights
from taskloom.ops.gating import batch_norm_silu_backward

BATCH = (4096, 3072)
EXPERTS = 12
# Sums over the whole batch.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def _given(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """z, weight and bias."""
    rows, width = shape
    experts = EXPERTS if width % EXPERTS == 0 else 4
    vectors = [1 + 0.1 * weights((experts, width // experts), seed) for seed in (1, 2)]
    return weights(shape, 0, dtype).reshape(rows, experts, -1), *vectors


def one_norm(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What nn.BatchNorm1d over all experts' features does, and SiLU."""
    return F.silu(F.batch_norm(z.flatten(1), None, None, weight.flatten(), bias.flatten(), True)).reshape(z.shape)


def norm_by_norm(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same by a norm for each expert."""
    experts = range(z.shape[1])
    return torch.stack([F.silu(F.batch_norm(z[:, one], None, None, weight[one], bias[one], True)) for one in experts], 1)


Form = Callable[[Tensor, Tensor, Tensor], Tensor]
FORMS: dict[str, Form] = {"one batch_norm, silu": one_norm, "a batch_norm for each expert, silu": norm_by_norm}


def _forward(shape: Shape, dtype: torch.dtype) -> Contest:
    given = _given(shape, dtype)
    peers = {name: partial(form, *given) for name, form in FORMS.items()}
    moved = 2 * given[0].nbytes + total_bytes(*given[1:])
    sizes = {"experts": given[0].shape[1]}
    return Contest(partial(taskloom.batch_norm_silu, *given, training=True), moved, peers, sizes=sizes, tolerance=TOLERANCES[dtype])


def _running(shape: Shape, dtype: torch.dtype) -> Contest:
    z, weight, bias = given = _given(shape, dtype)
    mean, var = 0.1 * weight, 0.5 + weight.square()

    def plain() -> Tensor:
        flat = [one.flatten() for one in (mean, var, weight, bias)]
        return F.silu(F.batch_norm(z.flatten(1), *flat)).reshape(z.shape)

    ours = partial(taskloom.batch_norm_silu, *given, mean, var, training=False)
    moved = 2 * z.nbytes + 2 * total_bytes(weight, bias)
    return Contest(ours, moved, {"one batch_norm, silu": plain}, sizes={"experts": z.shape[1]}, tolerance=TOLERANCES[dtype])


def _backward(shape: Shape, dtype: torch.dtype) -> Contest:
    given, gradient = _given(shape, dtype), weights(shape, 4, dtype)
    gradient = gradient.reshape(given[0].shape)
    leaves = [one.clone().requires_grad_() for one in given]
    found = torch.ops.taskloom.batch_norm_silu.default(*given, None, None, 1e-5, "silu")[1:]
    peers = {
        f"backward of {name}": partial(torch.autograd.grad, form(*leaves), leaves, gradient, retain_graph=True)
        for name, form in FORMS.items()
    }
    ours = partial(batch_norm_silu_backward, gradient, *given, *found)
    moved = 3 * given[0].nbytes + 2 * total_bytes(*given[1:])
    return Contest(ours, moved, peers, sizes={"experts": given[0].shape[1]}, tolerance=TOLERANCES[dtype])


ROWS = (
    Row("batch_norm_silu", _forward, "training", shape=BATCH, memory=True),
    Row("batch_norm_silu", _running, "running statistics", shape=BATCH),
    Row("batch_norm_silu_backward", _backward, "training", shape=BATCH, memory=True),
)

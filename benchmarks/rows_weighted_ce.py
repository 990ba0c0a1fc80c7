"""Rows of weighted_ce and its backward at a small size; ``bench_weighted_ce.py`` measures them as a model meets them."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import taskloom
from harness import Contest, Row, Shape
from inputs import total_bytes, weights
from taskloom.ops.masked import weighted_ce_backward

_SUPERVISED = 0.25


def _inputs(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states of as many rows as the head is wide, a head of the given shape, targets and weights."""
    vocabulary, width = shape
    hidden, head = weights((width, width), 0, dtype), (width**-0.5 * weights(shape, 1)).to(dtype)
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(0, vocabulary, (width,), generator=generator)
    return hidden, head, targets, (torch.rand(width, generator=generator) < _SUPERVISED).float()


def _compacted(hidden: Tensor, head: Tensor, targets: Tensor, some: Tensor) -> Tensor:
    rows = some > 0
    ce = F.cross_entropy((hidden[rows] @ head.t()).float(), targets[rows], reduction="none")
    return (some[rows] * ce).sum() / some.sum()


def _full(hidden: Tensor, head: Tensor, targets: Tensor, some: Tensor) -> Tensor:
    return (some * F.cross_entropy((hidden @ head.t()).float(), targets, reduction="none")).sum() / some.sum()


def _forward(shape: Shape, dtype: torch.dtype) -> Contest:
    given = _inputs(shape, dtype)
    rows = int((given[3] > 0).sum())
    moved = total_bytes(given[1]) + rows * given[0].shape[1] * dtype.itemsize
    peers = {"all logits": partial(_full, *given), "logits of supervised rows": partial(_compacted, *given)}
    return Contest(partial(taskloom.weighted_ce, *given), moved, peers, sizes={"supervised": rows})


def _backward(shape: Shape, dtype: torch.dtype) -> Contest:
    hidden, head, targets, some = _inputs(shape, dtype)
    coefficient = some / some.sum()
    log_sum_exp = (hidden.float() @ head.float().t()).logsumexp(1)
    leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()

    def compacted() -> tuple[Tensor, ...]:
        return torch.autograd.grad(_compacted(*leaves, targets, some), leaves)

    moved = 2 * total_bytes(head) + total_bytes(hidden)
    ours = partial(weighted_ce_backward, hidden, head, targets, coefficient, log_sum_exp)
    return Contest(ours, moved, {"forward and backward on supervised rows": compacted}, sizes={"supervised": int((some > 0).sum())})


# Peers round logits to bfloat16, so they agree in float32 only.
ROWS = (Row("weighted_ce", _forward), Row("weighted_ce_backward", _backward))

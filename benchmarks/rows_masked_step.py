"""Rows of the fused optimiser steps of active entries, beside torch's own steps of whole tensors with a masked gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import taskloom
from harness import Contest, Row, Shape
from inputs import bool_mask, packed_mask, weights

DENSITY = 0.1
STEP = 10

Step = Callable[[Tensor, Tensor, list[Tensor], Tensor], None]
DenseStep = Callable[[Tensor, Tensor, list[Tensor]], None]


def _moved(param: Tensor, active: int, states: int) -> int:
    """Parameter read and written and gradient read at active entries, state read and written, and the mask."""
    return 3 * active * param.itemsize + 2 * states * 4 * active + (param.numel() + 7) // 8


def _step_contest(shape: Shape, dtype: torch.dtype, states: int, ours: Step, theirs: DenseStep, peer: str) -> Contest:
    """A step in the middle of training: the same number, and the same state, for both."""
    param, grad = weights(shape, 0, dtype), weights(shape, 1, dtype)
    packed, mask = packed_mask(shape, 2, DENSITY), bool_mask(shape, 2, DENSITY)
    dense = [torch.where(mask, weights(shape, 3 + place).abs(), 0) for place in range(states)]
    compact = [one[mask] for one in dense]
    # Torch keeps state in the dtype of the parameter.
    dense = [one.to(dtype) for one in dense]

    def step() -> Tensor:
        ours(param, grad, compact, packed)
        return param

    def dense_step() -> Tensor:
        theirs(param, grad * mask, dense)
        return param

    moved = _moved(param, compact[0].numel(), states)
    changed = {"changes": param, "state": (*compact, *dense), "sizes": {"density": DENSITY, "step": STEP}}
    return Contest(ours=step, bytes=moved, peers={peer: dense_step}, **changed)


def adamw_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    options: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8}
    count = torch.tensor(float(STEP))

    def ours(param: Tensor, grad: Tensor, state: list[Tensor], packed: Tensor) -> None:
        taskloom.masked_adamw_(param, grad, state[0], state[1], packed, STEP, weight_decay=0.0)

    def fused(param: Tensor, grad: Tensor, state: list[Tensor]) -> None:
        torch._fused_adamw_([param], [grad], [state[0]], [state[1]], [], [count], amsgrad=False, maximize=False, **options)

    return _step_contest(shape, dtype, 2, ours, fused, "mask and fused AdamW")


def sgd_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0}

    def ours(param: Tensor, grad: Tensor, state: list[Tensor], packed: Tensor) -> None:
        taskloom.masked_sgd_(param, grad, state[0], packed, STEP, lr=0.1, momentum=0.9)

    def fused(param: Tensor, grad: Tensor, state: list[Tensor]) -> None:
        torch._fused_sgd_([param], [grad], state, nesterov=False, maximize=False, is_first_step=False, **options)

    return _step_contest(shape, dtype, 1, ours, fused, "mask and fused SGD")


ROWS = (
    Row("masked_adamw_", adamw_contest, "1 in 10 active", dtypes=(torch.float32,)),
    Row("masked_sgd_", sgd_contest, "1 in 10 active"),
)

"""Rows of the fused optimiser steps of active entries, beside torch's own steps of whole tensors with a masked gradient."""

from __future__ import annotations

import torch
from torch import Tensor

import taskloom
from harness import Contest, Row, Shape
from inputs import bool_mask, packed_mask, weights

DENSITY = 0.1


def _moved(param: Tensor, active: int, states: int) -> int:
    """Parameter read and written and gradient read at active entries, state read and written, and the mask."""
    return 3 * active * param.itemsize + 2 * states * 4 * active + (param.numel() + 7) // 8


def adamw_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    param, grad, packed, mask = (
        weights(shape, 0, dtype),
        weights(shape, 1, dtype),
        packed_mask(shape, 2, DENSITY),
        bool_mask(shape, 2, DENSITY),
    )
    active = int(mask.sum())
    first, second = torch.zeros(active), torch.zeros(active)
    dense = [torch.zeros(shape, dtype=dtype) for _ in range(2)]

    def ours() -> Tensor:
        first.zero_(), second.zero_()
        taskloom.masked_adamw_(param, grad, first, second, packed, 1, weight_decay=0.0)
        return param

    def fused() -> Tensor:
        for state in dense:
            state.zero_()
        options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8, "amsgrad": False, "maximize": False}
        torch._fused_adamw_([param], [grad * mask], [dense[0]], [dense[1]], [], [torch.tensor(1.0)], **options)
        return param

    return Contest(
        ours=ours, bytes=_moved(param, active, 2), peers={"mask and fused AdamW": fused}, changes=param, sizes={"density": DENSITY}
    )


def sgd_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    param, grad, packed, mask = (
        weights(shape, 0, dtype),
        weights(shape, 1, dtype),
        packed_mask(shape, 2, DENSITY),
        bool_mask(shape, 2, DENSITY),
    )
    buffer = torch.zeros(int(mask.sum()))
    dense = torch.zeros(shape, dtype=dtype)

    def ours() -> Tensor:
        taskloom.masked_sgd_(param, grad, buffer, packed, 1, lr=0.1, momentum=0.9)
        return param

    def eager() -> Tensor:
        dense.copy_(grad * mask)
        return param.add_(dense, alpha=-0.1)

    moved = _moved(param, buffer.numel(), 1)
    return Contest(ours=ours, bytes=moved, peers={"mask and SGD": eager}, changes=param, sizes={"density": DENSITY})


ROWS = (
    Row("masked_adamw_", adamw_contest, "1 in 10 active", dtypes=(torch.float32,)),
    Row("masked_sgd_", sgd_contest, "1 in 10 active"),
)

"""Fused optimiser steps of the active entries of parameters, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from taskloom.reference.masked.packed_mask import unpack_mask


def active_indices(active: Tensor, numel: int) -> Tensor:
    """Flat indices of the active entries: of packed bits, of ascending indices, or (an empty bool tensor) all."""
    if active.dtype == torch.bool:
        return torch.arange(numel, device=active.device)
    if active.dtype == torch.uint8:
        return unpack_mask(active, (numel,)).nonzero().squeeze(1)
    return active.long()


def _step(param: Tensor, grad: Tensor, active: Tensor, maximize: bool, rule: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Replace the active entries p of a parameter by rule(p, g), computed in float32 (float64 where it is float64)."""
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    flat = param.reshape(-1)
    chosen = active_indices(active, param.numel())
    slope = grad.reshape(-1)[chosen].to(dtype)
    stepped = rule(flat[chosen].to(dtype), -slope if maximize else slope).to(param.dtype)
    param.copy_(flat.index_copy(0, chosen, stepped).view(param.shape))


def _square_root(values: Tensor) -> Tensor:
    """Correctly rounded for float32, which torch's own vectorised root need not be."""
    return values.double().sqrt().to(values.dtype)


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    active: Sequence[Tensor],
    step: Sequence[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """One AdamW step; bias corrections in double, everything else rounded operation by operation."""
    for place, (param, grad, entries) in enumerate(zip(params, grads, active, strict=True)):
        mean, square = exp_avg[place], exp_avg_sq[place]
        step_size = -(lr / (1 - beta1 ** step[place]))
        root = math.sqrt(1 - beta2 ** step[place])

        def rule(p: Tensor, g: Tensor, m: Tensor = mean, v: Tensor = square, size: float = step_size, root: float = root) -> Tensor:
            m.copy_(m + (g - m) * (1 - beta1))
            v.copy_(v * beta2 + (g * (1 - beta2)) * g)
            return p * (1 - lr * weight_decay) + (m * size) / (_square_root(v) / torch.tensor(root, dtype=v.dtype, device=v.device) + eps)

        _step(param, grad, entries, maximize, rule)


def masked_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffer: Sequence[Tensor],
    active: Sequence[Tensor],
    step: Sequence[float],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    """One SGD step; a parameter's first step puts the gradient itself into the buffer."""
    for place, (param, grad, entries) in enumerate(zip(params, grads, active, strict=True)):

        def rule(p: Tensor, g: Tensor, place: int = place) -> Tensor:
            if weight_decay != 0:
                g = g + p * weight_decay
            if momentum != 0:
                buffer = momentum_buffer[place]
                buffer.copy_(g if step[place] <= 1 else buffer * momentum + g * (1 - dampening))
                g = g + buffer * momentum if nesterov else buffer
            return p + g * -lr

        _step(param, grad, entries, maximize, rule)

"""Rows of what trains: fused steps of active entries, and the fused head with its cross-entropy."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from contest import Call, Contest, Row
from inputs_on import bool_mask, normal
from torch import Tensor, nn

import taskloom

DENSITY = 0.1
STEP = 10


def _step_contest(device: torch.device, dtype: torch.dtype, entries: int, adamw: bool) -> Contest:
    """A step in the middle of training, the same number for both sides."""
    mask = bool_mask(device, entries, 2, DENSITY)
    packed, active = taskloom.reference.masked.pack_mask(mask), int(mask.sum())
    start, grad = normal(device, dtype, entries, 0), normal(device, dtype, entries, 1)
    param = start.clone()
    names = ("exp_avg", "exp_avg_sq") if adamw else ("momentum_buffer",)
    first = [normal(device, torch.float32, active, 3 + place).abs() for place in range(len(names))]
    state = [one.clone() for one in first]

    def ours() -> None:
        if adamw:
            taskloom.masked_adamw_(param, grad, state[0], state[1], packed, STEP)
        else:
            taskloom.masked_sgd_(param, grad, state[0], packed, STEP, lr=1e-3, momentum=0.9)

    def reset() -> None:
        for target, source in zip((param, *state), (start, *first), strict=True):
            target.copy_(source)

    def theirs(**options: Any) -> Call:
        dense = nn.Parameter(start.clone())
        dense.grad = grad.clone()
        kind: Any = torch.optim.AdamW if adamw else torch.optim.SGD
        settings = {"lr": 1e-3} if adamw else {"lr": 1e-3, "momentum": 0.9}
        optimizer = kind([dense], **settings, **options)
        factor = mask.to(dtype)

        def step() -> None:
            if dense.grad is not None:
                dense.grad.mul_(factor)
            optimizer.step()

        return step

    # Parameter read and written and gradient read at active entries, state read and written, and the mask.
    moved = 3 * active * param.itemsize + 2 * len(names) * 4 * active + packed.nbytes
    peers = {"mask, foreach": theirs(foreach=True), "mask, fused": theirs(fused=True)}
    return Contest(ours, moved, peers, reset=reset, result=lambda: (param, *state))


def adamw_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    return _step_contest(device, dtype, entries, adamw=True)


def sgd_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    return _step_contest(device, dtype, entries, adamw=False)


def _liger() -> Any:
    try:
        return importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
    except ImportError as error:
        raise RuntimeError("not installed") from error


def weighted_ce_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    """Loss and gradients of a head of 32,000 words over 4,096 rows, one in ten supervised; ``entries`` is that of the logits."""
    rows, words, width = (4096, 32000, 2048) if entries >= 1 << 20 else (64, 101, 32)
    hidden = normal(device, dtype, rows * width, 0).view(rows, width).requires_grad_()
    head = normal(device, dtype, words * width, 1, 0.02).view(words, width).requires_grad_()
    targets = torch.randint(0, words, (rows,), device=device, generator=torch.Generator(device).manual_seed(2))
    weights = bool_mask(device, rows, 3, 0.1).float()

    def trained(loss: Tensor) -> tuple[Tensor, ...]:
        return (loss.detach(), *torch.autograd.grad(loss, (hidden, head)))

    def full(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        each = F.cross_entropy((hidden @ head.t()).float(), targets, reduction="none")
        return (each * weights).sum() / weights.sum()

    def liger() -> tuple[Tensor, ...]:
        labels = torch.where(weights > 0, targets, -100)
        return trained(_liger().apply(hidden, head, labels)[0])

    weighted_ce: Any = taskloom.weighted_ce
    supervised = int(weights.sum())
    return Contest(
        ours=lambda: trained(weighted_ce(hidden, head, targets, weights)),
        # The head is read forward and backward and its gradient written; hidden states of supervised rows, and a gradient of all rows.
        bytes=3 * head.nbytes + 2 * supervised * width * hidden.itemsize + hidden.nbytes,
        peers={"full logits": lambda: trained(full(hidden, head, targets, weights)), "Liger": liger},
    )


ROWS = (
    Row("masked_adamw_", "1 in 10 active", adamw_contest, (torch.bfloat16, torch.float32)),
    Row("masked_sgd_", "1 in 10 active", sgd_contest),
    Row("weighted_ce", "loss and gradients, 1 in 10 rows", weighted_ce_contest, bits=27),
)

"""Rows of topk_gate at the shapes that routers are measured by: one token and thousands, 128 to 512 experts, and DeepSeek-V3's groups."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from contest import Contest, Row
from inputs_on import normal
from torch import Tensor

import taskloom
from routers import CHOSEN, DEEPSEEK, deepseek_router, plain_softmax_router, softmax_router
from taskloom.ops.gating import topk_gate_backward


def _sigmoid_router(logits: Tensor) -> tuple[Tensor, Tensor]:
    return torch.topk(logits.float().sigmoid(), CHOSEN, dim=-1)


ROUTERS = {"softmax": softmax_router, "plain": plain_softmax_router, "sigmoid": _sigmoid_router, "groups": deepseek_router}
OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {"renormalize": True},
    "plain": {},
    "sigmoid": {"score": "sigmoid"},
    "groups": DEEPSEEK,
}


def _given(device: torch.device, dtype: torch.dtype, entries: int, tokens: int, experts: int, kind: str) -> tuple[Tensor, ...]:
    rows = max(1, min(tokens, entries // experts))
    logits = normal(device, dtype, rows * experts, 0).reshape(rows, experts)
    return (logits, normal(device, torch.float32, experts, 1, 0.1)) if kind == "groups" else (logits,)


def gate_contest(device: torch.device, dtype: torch.dtype, entries: int, tokens: int, experts: int, kind: str) -> Contest:
    given = _given(device, dtype, entries, tokens, experts, kind)
    router = ROUTERS[kind]
    return Contest(
        ours=lambda: taskloom.topk_gate(given[0], CHOSEN, *given[1:], **OPTIONS[kind])[:2],
        bytes=given[0].nbytes + 8 * CHOSEN * len(given[0]),
        peers={"eager router": lambda: router(*given)},
        compiled=(router, given),
    )


def backward_contest(device: torch.device, dtype: torch.dtype, entries: int, tokens: int, experts: int, kind: str) -> Contest:
    given = _given(device, dtype, entries, tokens, experts, kind)
    options = OPTIONS[kind]
    gate = taskloom.topk_gate(given[0], CHOSEN, *given[1:], **options)
    slopes = normal(device, torch.float32, gate.weight.numel(), 2).reshape(gate.weight.shape)
    kept = {name: value for name, value in options.items() if name in ("score", "renormalize", "eps", "scale")}
    leaf = given[0].clone().requires_grad_()
    weight = ROUTERS[kind](leaf, *given[1:])[0]
    return Contest(
        ours=lambda: topk_gate_backward(given[0], gate.ids, gate.weight, slopes, **kept),
        bytes=2 * given[0].nbytes + 12 * CHOSEN * len(given[0]),
        peers={"backward of the eager router": lambda: torch.autograd.grad(weight, leaf, slopes, retain_graph=True)},
    )


def _row(make: Any, tokens: int, experts: int, kind: str) -> Row:
    op = "topk_gate" if make is gate_contest else "topk_gate_backward"
    named = {"softmax": "softmax", "plain": "softmax, not renormalised", "sigmoid": "sigmoid", "groups": "DeepSeek-V3"}[kind]
    return Row(
        op,
        f"{tokens} x {experts}, {named}",
        partial(make, tokens=tokens, experts=experts, kind=kind),
        dtypes=(torch.float32,) if kind == "groups" else (torch.float32, torch.bfloat16),
        bits=23,
        aim={"over": ("eager router", 5.0)} if make is gate_contest else {},
    )


ROWS = (
    _row(gate_contest, 1, 128, "softmax"),
    _row(gate_contest, 4096, 128, "softmax"),
    _row(gate_contest, 4096, 128, "sigmoid"),
    _row(gate_contest, 8192, 256, "softmax"),
    _row(gate_contest, 8192, 512, "sigmoid"),
    _row(gate_contest, 16384, 128, "softmax"),
    _row(gate_contest, 16384, 256, "softmax"),
    _row(gate_contest, 16384, 512, "plain"),
    _row(gate_contest, 8192, 256, "groups"),
    _row(backward_contest, 16384, 128, "softmax"),
    _row(backward_contest, 16384, 256, "plain"),
)

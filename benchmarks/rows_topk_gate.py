"""Rows of topk_gate and its backward: 4096 tokens, 8 experts each, of 128 and 256; and DeepSeek-V3's choice in groups."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import taskloom
from harness import Contest, Row, Shape
from inputs import total_bytes, weights
from routers import CHOSEN, DEEPSEEK, deepseek_router, plain_softmax_router, softmax_router
from taskloom.ops.gating import topk_gate_backward

TOKENS = 4096
Router = Callable[[Tensor], tuple[Tensor, Tensor]]


def _inputs(shape: Shape, dtype: torch.dtype, grouped: bool) -> tuple[Tensor, Tensor | None]:
    return weights(shape, 0, dtype), weights((shape[1],), 1) * 0.1 if grouped else None


def _router(bias: Tensor | None, renormalize: bool) -> Router:
    if bias is not None:
        return partial(deepseek_router, bias=bias)
    return softmax_router if renormalize else plain_softmax_router


def _options(grouped: bool, renormalize: bool) -> dict[str, Any]:
    return DEEPSEEK if grouped else {"renormalize": renormalize}


def gate_contest(shape: Shape, dtype: torch.dtype, grouped: bool = False, renormalize: bool = True) -> Contest:
    logits, bias = _inputs(shape, dtype, grouped)
    options, router = _options(grouped, renormalize), _router(bias, renormalize)
    return Contest(
        ours=lambda: taskloom.topk_gate(logits, CHOSEN, bias, **options)[:2],
        bytes=logits.nbytes + 8 * CHOSEN * shape[0],
        peers={"softmax, topk" if bias is None else "sigmoid, groups, topk": lambda: router(logits)},
        shared=lambda found: (found[0], found[1].long()),
        sizes={"experts": shape[1], "k": CHOSEN},
    )


def backward_contest(shape: Shape, dtype: torch.dtype, grouped: bool = False, renormalize: bool = True) -> Contest:
    logits, bias = _inputs(shape, dtype, grouped)
    options, router = _options(grouped, renormalize), _router(bias, renormalize)
    gate = taskloom.topk_gate(logits, CHOSEN, bias, **options)
    slopes = weights((shape[0], CHOSEN), 2)
    leaf = logits.clone().requires_grad_()
    weight = router(leaf)[0]
    kept = {name: value for name, value in options.items() if name in ("score", "renormalize", "eps", "scale")}
    return Contest(
        ours=lambda: topk_gate_backward(logits, gate.ids, gate.weight, slopes, **kept),
        bytes=(1 if renormalize else 2) * logits.nbytes + total_bytes(gate.weight, gate.ids, slopes),
        peers={"backward of the eager router": lambda: torch.autograd.grad(weight, leaf, slopes, retain_graph=True)[0]},
        sizes={"experts": shape[1], "k": CHOSEN},
    )


def _row(op: str, make: Callable[..., Contest], use: str, experts: int, **options: bool) -> Row:
    return Row(op, partial(make, **options), use, shape=(TOKENS, experts), memory=True)


ROWS = (
    _row("topk_gate", gate_contest, "128 experts", 128),
    _row("topk_gate", gate_contest, "256 experts", 256),
    _row("topk_gate", gate_contest, "256 experts, not renormalised", 256, renormalize=False),
    _row("topk_gate", gate_contest, "256 experts in groups", 256, grouped=True),
    _row("topk_gate_backward", backward_contest, "128 experts", 128),
    _row("topk_gate_backward", backward_contest, "256 experts, not renormalised", 256, renormalize=False),
    _row("topk_gate_backward", backward_contest, "256 experts in groups", 256, grouped=True),
)

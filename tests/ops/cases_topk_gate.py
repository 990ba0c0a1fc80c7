"""Contracts of topk_gate and its backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from contract import Case, Contract
from samples import weights, with_specials
from torch import Tensor

import taskloom
from taskloom.ops.gating import topk_gate_backward

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
V3: dict[str, Any] = {"score": "sigmoid", "n_group": 8, "topk_group": 4, "renormalize": True, "eps": 1e-20, "scale": 2.5}


def _ties(*shape: int) -> Tensor:
    values = (weights(*shape) * 2).round() / 2
    values[-1] = 1.25
    return values


def low_rows(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    """Two rows whose sigmoids are all 0, and partly."""
    values = weights(*shape, dtype=dtype)
    values[1] -= 900 if dtype == F64 else 98
    values[2] -= 709 if dtype == F64 else 89
    return values


def gate_cases() -> Iterator[Case]:
    yield Case("OLMoE", (weights(7, 64, dtype=BF16), 8))
    yield Case("Qwen3", (weights(5, 128, dtype=F16), 8), {"renormalize": True, "statistics": True})
    yield Case("DeepSeek-V2", (weights(4, 160), 6), {"n_group": 8, "topk_group": 3, "scale": 16.0})
    yield Case("DeepSeek-V3", (weights(4, 256), 8, weights(256, seed=1, scale=0.1)), V3 | {"statistics": True})
    low = weights(256, seed=1, dtype=BF16) - 3
    yield Case("DeepSeek-V3, masked by 0", (weights(4, 256, dtype=BF16), 8, low), V3 | {"group_mask": 0.0})
    yield Case("Mixtral", (weights(3, 8, dtype=F64), 2), {"renormalize": True, "ids_dtype": torch.int64})
    biased = {"renormalize": True, "eps": 0.1, "temperature": 0.7, "ids_dtype": torch.int64, "statistics": True}
    yield Case("softmax and bias", (weights(5, 33), 4, weights(33, seed=1, dtype=F16)), biased)
    yield Case("specials", (with_specials(7, 40), 5), {"statistics": True})
    yield Case("specials by scores", (with_specials(7, 40), 5, weights(40)), {"score": "sigmoid", "renormalize": True})
    yield Case("ties", (_ties(5, 70), 32), {"renormalize": True})
    yield Case("all experts", (weights(3, 17, dtype=F64), 17, weights(17)), {"score": "sigmoid", "statistics": True})
    yield Case("one expert", (weights(4, 1), 1))
    yield Case("strided", (weights(1000, 3).t(), 10), {"renormalize": True, "temperature": 3.0})
    yield Case("rows apart", (weights(3, 600)[:, 7:264], 9))
    yield Case("very many experts", (weights(2, 2050), 4, weights(2050, seed=1, scale=1e-3)), {"statistics": True})
    yield Case("very many experts, by order", (weights(2, 2050, dtype=BF16), 4))
    yield Case("many groups", (weights(3, 60), 7), {"n_group": 20, "topk_group": 7, "score": "sigmoid"})
    yield Case("groups of two, masked", (weights(3, 38), 7), {"n_group": 19, "topk_group": 5, "group_score": "top2", "group_mask": 0.0})
    yield Case("several pieces", (weights(70, 512, scale=3), 2), {"statistics": True})
    yield Case("three dimensions", (weights(2, 3, 16), 2), {"statistics": True})
    for dtype in (F32, BF16, F64):
        yield Case(f"low sigmoids, {dtype}", (low_rows(5, 40, dtype=dtype), 3), {"score": "sigmoid", "statistics": True})
    yield Case("no rows", (weights(0, 16), 2), {"statistics": True})
    yield Case("gradient", (weights(5, 33).requires_grad_(), 4), {"renormalize": True, "statistics": True})


def _slopes(logits: Tensor, k: int, which: str = "w", **options: Any) -> Case:
    """A case with gradients of the weights (w), probability sums (p) and log-sum-exps (l)."""
    with taskloom.backend("reference"):
        found = taskloom.topk_gate(logits, k, statistics=True, **options)
    shapes = {"w": found.weight.shape, "p": logits.shape[1:], "l": logits.shape[:1]}
    slopes = [weights(*shapes[one], seed=5 + place, dtype=found.weight.dtype) if one in which else None for place, one in enumerate("wpl")]
    kept = {name: value for name, value in options.items() if name in ("score", "renormalize", "scale", "eps", "temperature")}
    name = ", ".join([which, *(f"{option}" for option in kept.items())]) + f", {logits.dtype} {tuple(logits.shape)}"
    return Case(name, (logits, found.ids, found.weight, *slopes), kept)


def backward_cases() -> Iterator[Case]:
    x = weights(5, 33)
    yield _slopes(x, 4, scale=16.0)
    yield _slopes(x.to(BF16), 4, renormalize=True, temperature=0.7)
    yield _slopes(weights(3, 64, dtype=F16), 8, "wpl", renormalize=True, eps=0.1)
    yield _slopes(x, 4, "wpl", score="sigmoid")
    yield _slopes(weights(4, 256), 8, score="sigmoid", renormalize=True, eps=1e-20, scale=2.5)
    yield _slopes(weights(3, 17, dtype=F64), 17, "p", score="sigmoid", temperature=2.0)
    yield _slopes(weights(3, 2050), 32, "wl", ids_dtype=torch.int64)
    yield _slopes(weights(1000, 3).t(), 10, "l", score="sigmoid")
    yield _slopes(weights(3, 1), 1, "wp", renormalize=True, scale=0.0)
    yield _slopes(x, 4, renormalize=True, scale=1e-50)
    yield _slopes(with_specials(7, 40), 5, renormalize=True)
    for dtype in (F32, BF16, F64):
        yield _slopes(low_rows(5, 40, dtype=dtype), 3, "p", score="sigmoid", temperature=1.01)
    yield _slopes(low_rows(5, 1100), 3, "wpl", score="sigmoid")
    yield _slopes(weights(0, 16), 2, "wpl")


CONTRACTS = (
    Contract("topk_gate", taskloom.topk_gate, gate_cases),
    Contract("topk_gate_backward", topk_gate_backward, backward_cases),
)

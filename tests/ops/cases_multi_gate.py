"""Contracts of the gates over one pool of experts, and of the softmax gate over very many linear ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from contract import Case, Contract
from samples import weights
from torch import Tensor

import taskloom
from taskloom import reference
from taskloom.ops.gating import multi_gate_combine_backward, stream_softmax_mix_backward

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
# Three gates over five experts: a shared one, two of the first gate, one of the second, and one that nobody may read.
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
OWN = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)


def _gates(batch: int = 3, gates: int = 3, experts: int = 5, width: int = 37, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor]:
    return weights(batch, gates, experts, seed=1, dtype=dtype, scale=2), weights(batch, experts, width, seed=2, dtype=dtype)


def _self_gate(dtype: torch.dtype = F32) -> dict[str, Any]:
    return {"self_logits": weights(3, 3, 5, seed=3, dtype=dtype, scale=2), "self_mask": OWN}


def _uses() -> Iterator[tuple[str, tuple[Tensor, ...], dict[str, Any]]]:
    """Logits, experts and a mask by name, and what else the op is given."""
    for dtype in (F32, BF16, F64):
        yield f"{dtype}", _gates(dtype=dtype), {}
        yield f"self gate, {dtype}", (*_gates(dtype=dtype), MASK), _self_gate(dtype)
    yield "sigmoid", _gates(), {"activation": "sigmoid"}
    yield "sigmoid, masked", (*_gates(), MASK), {"activation": "sigmoid"} | _self_gate()
    yield "all experts and a self gate", _gates(), _self_gate()
    yield "one gate, one expert, one place", (*_gates(4, 1, 1, 1), MASK[:1, :1]), {}
    logits, z = _gates(2, 9, 40, 300)
    yield "many experts", (logits.half(), z), {}
    yield "pieces", _gates(40, 2, 3, 1100), {}
    yield "wide", _gates(2, 2, 3, 1100), {"activation": "sigmoid"}
    logits, z = _gates(width=74)
    strided = (logits.transpose(0, 1).contiguous().transpose(0, 1), z[..., ::2], OWN.t().contiguous().t())
    yield "strided", strided, {"self_logits": weights(5, 3, 3).permute(2, 1, 0), "self_mask": OWN[:1].expand(3, 5)}
    yield "mixed dtypes", (logits.double(), z.half(), MASK), {}
    yield "no rows", _gates(0), {}
    yield "no width", _gates(width=0), {}


def combine_cases() -> Iterator[Case]:
    for name, given, settings in _uses():
        yield Case(name, given, settings)
    leaves = tuple(one.requires_grad_() for one in _gates())
    yield Case("gradient", (*leaves, MASK), {"self_logits": weights(3, 3, 5, seed=3).requires_grad_(), "self_mask": OWN})


def combine_backward_cases() -> Iterator[Case]:
    for name, given, settings in _uses():
        logits, z = given[:2]
        gradient = weights(*logits.shape[:2], z.shape[2], seed=4, dtype=z.dtype)
        yield Case(name, (gradient, *given), settings)
    given = (weights(3, 3, 37, seed=4), *_gates(), MASK)
    slopes = {"for_probs": weights(3, 3, 5, seed=5)}
    yield Case("gradient of the weights", given, slopes | _self_gate())
    yield Case("only logits", given, slopes | _self_gate() | {"for_z": False, "for_self": False})
    yield Case("only experts", given, _self_gate() | {"for_logits": False, "for_self": False})
    yield Case("only the self gate", given, slopes | _self_gate() | {"for_logits": False, "for_z": False})


def _pairs(
    batch: int = 3, pairs: int = 5, dims: int = 3, experts: int = 11, dtype: torch.dtype = F32
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Pairs that one of the experts made, so that late weights are neither all alike nor all one."""
    pool, x = weights(experts, dims, seed=1), weights(batch, pairs, dims, seed=2)
    y = torch.einsum("bkd,bd->bk", x, pool[torch.arange(batch) % experts]) + 0.5 * weights(batch, pairs, seed=3)
    return x.to(dtype), y.to(dtype), pool.to(dtype), 0.5


def _mixes() -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor, float]]]:
    for dtype in (F32, BF16, F64):
        yield f"{dtype}", _pairs(dtype=dtype)
    yield "one expert", _pairs(experts=1)
    yield "one dimension", _pairs(dims=1, experts=40)
    yield "tiles", _pairs(2, 9, 8, 1500)
    yield "chunks", _pairs(2, 4, 2, 9000)
    yield "long and wide", _pairs(2, 70, 66, 90)
    x, y, experts, _ = _pairs(4, 6, 4, 33)
    yield "strided", (x.transpose(0, 1).contiguous().transpose(0, 1), y.t().contiguous().t(), experts.t().contiguous().t(), 2.0)
    yield "mixed dtypes", (x.half(), y.bfloat16(), experts, 1.0)
    yield "one double", (x, y.double(), experts, 1.0)
    yield "no sequences", _pairs(0)
    yield "no pairs", _pairs(3, 0)


def mix_cases() -> Iterator[Case]:
    for name, given in _mixes():
        yield Case(name, given)
    x, y, experts, sigma = _pairs()
    yield Case("gradient", (x.requires_grad_(), y.requires_grad_(), experts.requires_grad_(), sigma))


def mix_backward_cases() -> Iterator[Case]:
    for name, given in _mixes():
        pred, lse = reference.gating.stream_softmax_mix(*given)
        slopes = [weights(*pred.shape, seed=seed, dtype=pred.dtype) for seed in (4, 5)]
        x, y, experts, sigma = given
        yield Case(name, (*slopes, x, y, experts, pred, lse, sigma))
    x, y, experts, sigma = _pairs()
    given = (x, y, experts, *reference.gating.stream_softmax_mix(x, y, experts, sigma), sigma)
    yield Case("only x", (slopes[0].new_ones(3, 5), None, *given), {"for_y": False, "for_experts": False})
    yield Case("only y", (None, torch.ones(3, 5), *given), {"for_x": False, "for_experts": False})
    yield Case("only experts", (torch.ones(3, 5), torch.ones(3, 5), *given), {"for_x": False, "for_y": False})


CONTRACTS = (
    Contract("multi_gate_combine", taskloom.multi_gate_combine, combine_cases),
    Contract("multi_gate_combine_backward", multi_gate_combine_backward, combine_backward_cases),
    # Likelihoods of many pairs differ by large numbers, whose rounding is that of the logarithms of the weights.
    Contract("stream_softmax_mix", taskloom.stream_softmax_mix, mix_cases, single=1e-5),
    Contract("stream_softmax_mix_backward", stream_softmax_mix_backward, mix_backward_cases, single=3e-5),
)

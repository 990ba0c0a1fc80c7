"""Rows of the gates over one pool of experts: six gates and twelve experts, all of them or as HoME's second level masks them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import taskloom
from harness import Call, Contest, Row, Shape
from inputs import total_bytes, weights
from taskloom.ops.gating import multi_gate_combine_backward

GATES, EXPERTS = 6, 12
SHAPE: Shape = (4096, 256)
# Two shared experts, two of each of two categories of three tasks, one of each task; the self gates read all but the shared ones.
_TASK = torch.arange(GATES)[:, None]
_OWN = torch.cat([torch.arange(4)[None] // 2 == _TASK // 3, torch.arange(GATES)[None] == _TASK], 1)
MASK = torch.cat([torch.ones(GATES, 2, dtype=torch.bool), _OWN], 1)
SELF_MASK = torch.cat([torch.zeros(GATES, 2, dtype=torch.bool), _OWN], 1)

Forward = Callable[[Tensor, Tensor], Tensor]


def _given(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, experts and a gradient of the result; logits are float32, as a gate's projection is kept."""
    batch, width = shape
    logits = weights((batch, GATES * EXPERTS), 0).reshape(batch, GATES, EXPERTS)
    z = weights((batch, EXPERTS * width), 1, dtype).reshape(batch, EXPERTS, width)
    return logits, z, weights((batch, GATES * width), 2, dtype).reshape(batch, GATES, width)


def _probs(logits: Tensor, mask: Tensor | None) -> Tensor:
    return torch.softmax(logits if mask is None else logits.masked_fill(~mask, -torch.inf), -1)


def _einsum(mask: Tensor | None) -> Forward:
    return lambda logits, z: torch.einsum("bge,bed->bgd", _probs(logits, mask).to(z.dtype), z)


def _loop(mask: Tensor | None) -> Forward:
    """As multi-task libraries write it: gate by gate, the experts that it reads put together, weighed and added up."""
    lists = [None if mask is None else mask[g].nonzero().flatten() for g in range(GATES)]

    def run(logits: Tensor, z: Tensor) -> Tensor:
        outs = []
        for g, readable in enumerate(lists):
            said, experts = (logits[:, g], z) if readable is None else (logits[:, g, readable], z[:, readable])
            outs.append((torch.softmax(said, -1).to(z.dtype)[..., None] * experts).sum(1))
        return torch.stack(outs, 1)

    return run


def _forms(shape: Shape, mask: Tensor | None) -> dict[str, Forward]:
    forms = {"softmax, einsum": _einsum(mask), "loop over gates": _loop(mask)}
    # The compiler takes many seconds, which is for the full size only.
    if shape == SHAPE:
        forms |= {f"{name}, compiled": torch.compile(form) for name, form in forms.items()}
    return forms


def combine_contest(shape: Shape, dtype: torch.dtype, mask: Tensor | None = None) -> Contest:
    logits, z, gradient = _given(shape, dtype)

    def peer(form: Forward) -> Call:
        return lambda: form(logits, z)

    return Contest(
        ours=lambda: taskloom.multi_gate_combine(logits, z, mask),
        bytes=total_bytes(logits, logits, z, gradient),
        peers={name: peer(form) for name, form in _forms(shape, mask).items()},
        shared=lambda result: result[0] if isinstance(result, tuple) else result,
        sizes={"gates": GATES, "experts": EXPERTS},
    )


def backward_contest(shape: Shape, dtype: torch.dtype, mask: Tensor | None = None) -> Contest:
    logits, z, gradient = _given(shape, dtype)
    leaves = [one.clone().requires_grad_() for one in (logits, z)]

    def peer(form: Forward) -> Call:
        out = form(*leaves)
        return lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True)

    return Contest(
        ours=lambda: multi_gate_combine_backward(gradient, logits, z, mask)[:2],
        bytes=total_bytes(logits, logits, z, z, gradient),
        peers={f"backward of {name}": peer(form) for name, form in _forms(shape, mask).items() if "compiled" not in name},
        sizes={"gates": GATES, "experts": EXPERTS},
    )


def self_gate_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    logits, z, gradient = _given(shape, dtype)
    own = logits.flip(2).contiguous()

    def eager() -> Tensor:
        both = _probs(logits, MASK) + _probs(own, SELF_MASK)
        return torch.einsum("bge,bed->bgd", both.to(z.dtype), z)

    return Contest(
        ours=lambda: taskloom.multi_gate_combine(logits, z, MASK, self_logits=own, self_mask=SELF_MASK),
        bytes=total_bytes(logits, logits, own, z, gradient),
        peers={"two softmaxes, einsum": eager},
        shared=lambda result: result[0] if isinstance(result, tuple) else result,
        sizes={"gates": GATES, "experts": EXPERTS},
    )


ROWS = (
    Row("multi_gate_combine", combine_contest, "all experts", shape=SHAPE, memory=True),
    Row("multi_gate_combine", lambda shape, dtype: combine_contest(shape, dtype, MASK), "masked", shape=SHAPE, memory=True),
    Row("multi_gate_combine", self_gate_contest, "masked, self gates", shape=SHAPE, memory=True),
    Row("multi_gate_combine_backward", backward_contest, "all experts", shape=SHAPE, memory=True),
    Row("multi_gate_combine_backward", lambda shape, dtype: backward_contest(shape, dtype, MASK), "masked", shape=SHAPE, memory=True),
)

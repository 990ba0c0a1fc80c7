"""Rows of the gates over one pool of experts, six gates and twelve experts, and of the softmax mix, 16 pairs of 8 dimensions."""

from __future__ import annotations

import torch
from contest import Contest, Row
from inputs_on import normal, total_bytes
from torch import Tensor

import taskloom

GATES, EXPERTS, WIDTH = 6, 12, 256
PAIRS, DIMS, SIGMA = 16, 8, 0.5


def _gates(device: torch.device, dtype: torch.dtype, entries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, experts and which of them each gate reads: the first half, and one of its own."""
    width = min(WIDTH, max(1, entries // (4 * EXPERTS)))
    batch = max(1, entries // (EXPERTS * width))
    logits = normal(device, torch.float32, batch * GATES * EXPERTS, 0).reshape(batch, GATES, EXPERTS)
    z = normal(device, dtype, batch * EXPERTS * width, 1).reshape(batch, EXPERTS, width)
    expert, gate = torch.arange(EXPERTS, device=device), torch.arange(GATES, device=device)[:, None]
    return logits, z, (expert < EXPERTS // 2) | (expert == EXPERTS // 2 + gate)


def _eager(logits: Tensor, z: Tensor, mask: Tensor) -> Tensor:
    return torch.einsum("bge,bed->bgd", torch.softmax(logits.masked_fill(~mask, -torch.inf), -1).to(z.dtype), z)


def combine_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    given = _gates(device, dtype, entries)
    logits, z, _ = given
    return Contest(
        ours=lambda: taskloom.multi_gate_combine(*given),
        bytes=z.nbytes + z.nbytes * GATES // EXPERTS + total_bytes(logits, logits),
        peers={"softmax, einsum": lambda: _eager(*given)},
        compiled=(_eager, given),
    )


def backward_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    logits, z, mask = _gates(device, dtype, entries)
    leaves = [logits.requires_grad_(), z.requires_grad_()]
    gradient = normal(device, dtype, len(z) * GATES * z.shape[2], 2).reshape(len(z), GATES, z.shape[2])
    outs = {"ours": taskloom.multi_gate_combine(logits, z, mask)[0], "eager": _eager(logits, z, mask)}

    def slopes(name: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outs[name], leaves, gradient, retain_graph=True)

    return Contest(
        ours=lambda: slopes("ours"),
        bytes=2 * z.nbytes + gradient.nbytes + total_bytes(logits, logits),
        peers={"backward of softmax, einsum": lambda: slopes("eager")},
    )


def mix_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    batch = 64 if entries >= 1 << 20 else 2
    count = max(1, entries // (batch * PAIRS))
    x = normal(device, dtype, batch * PAIRS * DIMS, 0).reshape(batch, PAIRS, DIMS)
    y, experts = normal(device, dtype, batch * PAIRS, 1).reshape(batch, PAIRS), normal(device, dtype, count * DIMS, 2).reshape(count, DIMS)

    def naive(x: Tensor, y: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        predictions = x @ experts.T
        squares = (y[..., None] - predictions).square()
        scores = torch.cat([torch.zeros_like(squares[:, :1]), squares.cumsum(1)[:, :-1]], 1) * (-0.5 / SIGMA**2)
        return (torch.softmax(scores, -1) * predictions).sum(-1), torch.logsumexp(scores, -1)

    return Contest(
        ours=lambda: tuple(taskloom.stream_softmax_mix(x, y, experts, SIGMA)),
        bytes=total_bytes(x, y, experts, y, y),
        peers={"[B, K, M] in memory": lambda: naive(x, y, experts)},
        compiled=(naive, (x, y, experts)),
        tolerance=1e-4,
    )


ROWS = (
    Row("multi_gate_combine", "masked", combine_contest, bits=25),
    Row("multi_gate_combine_backward", "masked", backward_contest, bits=25),
    Row("stream_softmax_mix", "64 sequences", mix_contest, (torch.float32,), bits=26),
)

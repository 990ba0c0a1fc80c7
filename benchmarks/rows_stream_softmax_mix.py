"""Rows of the softmax gate over very many linear experts: sixteen pairs of eight dimensions, as in the paper."""

from __future__ import annotations

import torch
from torch import Tensor

import taskloom
from harness import Contest, Row, Shape
from inputs import total_bytes, weights
from taskloom.ops.gating import stream_softmax_mix_backward

PAIRS, DIMS, SIGMA, CHUNK = 16, 8, 0.5, 4096


def _given(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets of experts that are not in the pool, and the pool."""
    batch, count = shape
    x, own = weights((batch, PAIRS * DIMS), 0).reshape(batch, PAIRS, DIMS), weights((batch, DIMS), 1)
    return x, torch.einsum("bkd,bd->bk", x, own) + SIGMA * weights((batch, PAIRS), 2), weights((count, DIMS), 3)


def _scores(x: Tensor, y: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    predictions = x @ experts.T
    squares = (y[..., None] - predictions).square().cumsum(1)
    before = torch.cat([torch.zeros_like(squares[:, :1]), squares[:, :-1]], 1)
    return predictions, before.mul_(-0.5 / SIGMA**2)


def naive(x: Tensor, y: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    predictions, scores = _scores(x, y, experts)
    return (torch.softmax(scores, -1) * predictions).sum(-1), torch.logsumexp(scores, -1)


def chunked(x: Tensor, y: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Chunks of experts with an online softmax, by torch."""
    largest = torch.full_like(y, -torch.inf)
    total, mixed = torch.zeros_like(y), torch.zeros_like(y)
    for first in range(0, len(experts), CHUNK):
        predictions, scores = _scores(x, y, experts[first : first + CHUNK])
        higher = torch.maximum(largest, scores.amax(-1))
        likelihood, shrink = scores.sub_(higher[..., None]).exp_(), torch.exp(largest - higher)
        total = total * shrink + likelihood.sum(-1)
        mixed = mixed * shrink + likelihood.mul_(predictions).sum(-1)
        largest = higher
    return mixed / total, largest + total.log()


def mix_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    x, y, experts = (one.to(dtype) for one in _given(shape))
    return Contest(
        ours=lambda: tuple(taskloom.stream_softmax_mix(x, y, experts, SIGMA)),
        bytes=total_bytes(x, y, experts, y, y),
        peers={"[B, K, M] in memory": lambda: naive(x, y, experts), "chunks, online softmax": lambda: chunked(x, y, experts)},
        sizes={"pairs": PAIRS, "dims": DIMS},
        tolerance=2e-5,
    )


def mix_backward_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    given = [one.to(dtype).requires_grad_() for one in _given(shape)]
    slopes = [weights((shape[0], PAIRS), seed, dtype) for seed in (4, 5)]
    found = naive(*given)
    fixed = [one.detach() for one in (*given, *found)]
    return Contest(
        ours=lambda: stream_softmax_mix_backward(*slopes, *fixed, SIGMA),
        bytes=2 * total_bytes(*fixed[:3]) + total_bytes(*slopes, *fixed[3:]),
        peers={"backward of [B, K, M] in memory": lambda: torch.autograd.grad(found, given, slopes, retain_graph=True)},
        sizes={"pairs": PAIRS, "dims": DIMS},
        tolerance=1e-4,
    )


ROWS = (
    Row("stream_softmax_mix", mix_contest, "4096 experts", (torch.float32,), (64, 4096), memory=True),
    Row("stream_softmax_mix", mix_contest, "65536 experts", (torch.float32,), (16, 65536), memory=True),
    Row("stream_softmax_mix_backward", mix_backward_contest, "4096 experts", (torch.float32,), (64, 4096), memory=True),
)

"""Rows of the merges of thin factors by a kernel: SNELLA's kernel and gate at rank 32, beside their official form in torch."""

from __future__ import annotations

from typing import Any

import torch
from contest import Contest, Row
from inputs_on import normal, total_bytes
from torch import Tensor

import kernel_forms
import taskloom
from taskloom.ops.lowrank import kernel_linear_backward, kernel_merge_backward

CHUNKS, WIDTH = 2, 16
SPARSITY = 0.9
TOKENS = 8 * 197
# An entry at the threshold lands on either side of it; the sums of a gradient are told apart by no more than that.
GATED = 4e-3


class Layer:
    """Inputs of one square layer, whose weight has ``entries`` entries: what is learned is float32."""

    def __init__(self, device: torch.device, dtype: torch.dtype, entries: int) -> None:
        self.size = int(entries**0.5)
        shape = (CHUNKS, self.size, WIDTH)
        a, b = (normal(device, torch.float32, torch.Size(shape).numel(), seed, 0.1).view(shape) for seed in (1, 2))
        self.factors = a, b, torch.tensor([1.0, -1.0], device=device)
        one, nothing = torch.ones((), device=device), torch.zeros((), device=device)
        self.numbers = one, one.clone(), nothing
        self.named: dict[str, Any] = dict(zip(("alpha", "gamma", "beta"), self.numbers, strict=True))
        self.base = normal(device, dtype, self.size**2, 3).view(self.size, self.size)
        tokens = TOKENS if entries >= 1 << 20 else 5
        self.x = normal(device, dtype, tokens * self.size, 4).view(tokens, self.size)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Threshold and row statistics, which a backward takes."""
        threshold = taskloom.kernel_quantile(*self.factors, sparsity=SPARSITY, **self.named)
        A, B, coef = self.factors
        mixed = (coef[:, None, None] * torch.cdist(A, B, compute_mode="donot_use_mm_for_euclid_dist")).sum(0)
        largest = mixed.amax(1)
        return threshold, torch.stack([largest, (mixed - largest[:, None]).exp().sum(1)])

    def merged(self, base: Tensor, learned: tuple[Tensor, ...]) -> Tensor:
        """The weight by the official form, in the base's dtype."""
        return kernel_forms.merged(base, learned[0], learned[1], learned[2], learned[3:], SPARSITY).to(base.dtype)

    def learned(self) -> tuple[Tensor, ...]:
        """A, B, coef and scalars as leaves."""
        return tuple(one.clone().requires_grad_() for one in (*self.factors, *self.numbers))


def merge_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    layer = Layer(device, dtype, entries)
    given = (*layer.factors, *layer.numbers)
    return Contest(
        ours=lambda: taskloom.kernel_merge(*layer.factors, sparsity=SPARSITY, base=layer.base, **layer.named),
        bytes=2 * layer.base.nbytes,
        peers={"eager": lambda: layer.merged(layer.base, given)},
    )


def ungated_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    """Without a gate there is no threshold to look for: what is left is the writing, and the arithmetic of the entries."""
    layer = Layer(device, dtype, entries)

    def eager(base: Tensor, a: Tensor, b: Tensor, coef: Tensor) -> Tensor:
        distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        return (base + (coef[:, None, None] * distances).sum(0).T).to(base.dtype)

    return Contest(
        ours=lambda: taskloom.kernel_merge(*layer.factors, kernel="pwl", gate=None, base=layer.base),
        bytes=2 * layer.base.nbytes,
        peers={"eager": lambda: eager(layer.base, *layer.factors)},
    )


def backward_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    layer = Layer(device, dtype, entries)
    threshold, row_stats = layer.statistics()
    upstream = normal(device, dtype, layer.size**2, 5).view(layer.size, layer.size)

    def eager() -> tuple[Tensor, ...]:
        leaves = layer.learned()
        return torch.autograd.grad(layer.merged(layer.base, leaves), leaves, upstream)

    return Contest(
        ours=lambda: kernel_merge_backward(upstream, *layer.factors, threshold, row_stats, **layer.named),
        # The gradient of a softmax takes a sum over each row before the entries.
        bytes=2 * upstream.nbytes,
        peers={"eager, forward and backward": eager},
        tolerance=GATED,
    )


def linear_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    layer = Layer(device, dtype, entries)
    given = (*layer.factors, *layer.numbers)
    return Contest(
        ours=lambda: taskloom.kernel_linear(layer.x, *layer.factors, sparsity=SPARSITY, base=layer.base, **layer.named),
        bytes=2 * layer.x.nbytes + layer.base.nbytes,
        peers={"eager": lambda: layer.x @ layer.merged(layer.base, given).T},
    )


def linear_backward_contest(device: torch.device, dtype: torch.dtype, entries: int) -> Contest:
    layer = Layer(device, dtype, entries)
    threshold, row_stats = layer.statistics()
    upstream = normal(device, dtype, layer.x.numel(), 5).view_as(layer.x)

    def eager() -> tuple[Tensor, ...]:
        leaves, x, base = layer.learned(), layer.x.clone().requires_grad_(), layer.base.clone().requires_grad_()
        return torch.autograd.grad(x @ layer.merged(base, leaves).T, (x, *leaves, base), upstream)

    return Contest(
        ours=lambda: kernel_linear_backward(upstream, layer.x, *layer.factors, threshold, row_stats, base=layer.base, **layer.named),
        # The gradient of the merged weight is float32.
        bytes=total_bytes(upstream, layer.x, layer.x, layer.base) + 4 * layer.base.numel(),
        peers={"eager, forward and backward": eager},
        tolerance=GATED,
    )


_RANK = f"rank {CHUNKS * WIDTH}"
# Within 1.5 times of reading the weight and writing the result, and within twice of two reads of the gradient.
_WRITTEN, _READ = {"share": 0.66}, {"share": 0.5}

ROWS = (
    Row("kernel_merge", f"{_RANK}, 1 in 10 kept", merge_contest, bits=24, aim=_WRITTEN),
    Row("kernel_merge", f"{_RANK}, no gate", ungated_contest, bits=24, aim=_WRITTEN),
    Row("kernel_merge_backward", _RANK, backward_contest, bits=24, aim=_READ),
    Row("kernel_linear", f"{_RANK}, {TOKENS} tokens", linear_contest, bits=24),
    Row("kernel_linear_backward", f"{_RANK}, {TOKENS} tokens", linear_backward_contest, bits=24),
)

"""Rows of kernel_merge, kernel_merge_out, kernel_quantile, kernel_linear and their backwards: SNELLA's kernel and gate at rank 32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kernel_forms
import taskloom
from harness import SHAPE, Contest, Row, Shape
from inputs import total_bytes, weights
from taskloom.ops.lowrank import kernel_linear_backward, kernel_merge_backward

SPARSITY = 0.9
CHUNKS, WIDTH = 2, 16
TOKENS = 8 * 197
SIZES: tuple[Shape, ...] = ((768, 768), (3072, 768), (4096, 4096))


class Layer:
    """Inputs of one layer of out by in features; a small one where a test asks for it."""

    def __init__(self, shape: Shape, own: Shape) -> None:
        self.shape = own if shape == SHAPE else shape
        m, n = self.shape
        self.factors = (0.1 * weights((CHUNKS, n, WIDTH), 1), 0.1 * weights((CHUNKS, m, WIDTH), 2), torch.tensor([1.0, -1.0]))
        self.numbers = (torch.tensor(1.0), torch.tensor(1.0), torch.tensor(0.0))
        self.base = weights(self.shape, 3)
        self.x = weights((TOKENS if shape == SHAPE else 5, n), 4)
        self.named: dict[str, Any] = dict(zip(("alpha", "gamma", "beta"), self.numbers, strict=True))
        self.sizes = {"outputs": m, "inputs": n, "rank": CHUNKS * WIDTH, "sparsity": SPARSITY}

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Threshold and row statistics."""
        arguments = (*self.factors, *self.numbers, None, "mixk", SPARSITY, "magnitude")
        _, threshold, row_stats = torch.ops.taskloom.kernel_merge.default(*arguments)
        return threshold, row_stats

    def learned(self) -> tuple[Tensor, ...]:
        """A, B, coef and scalars as leaves."""
        return tuple(one.clone().requires_grad_() for one in (*self.factors, *self.numbers))


def merge_contest(own: Shape, shape: Shape, dtype: torch.dtype) -> Contest:
    layer = Layer(shape, own)
    return Contest(
        ours=lambda: taskloom.kernel_merge(*layer.factors, sparsity=SPARSITY, base=layer.base, **layer.named),
        bytes=2 * layer.base.nbytes,
        peers={"eager": lambda: kernel_forms.merged(layer.base, *layer.factors, layer.numbers, SPARSITY)},
        sizes=layer.sizes,
    )


def merge_out_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    layer = Layer(shape, SIZES[1])
    mine, theirs = torch.empty_like(layer.base), torch.empty_like(layer.base)
    return Contest(
        ours=lambda: taskloom.kernel_merge(*layer.factors, sparsity=SPARSITY, base=layer.base, out=mine, **layer.named),
        bytes=2 * layer.base.nbytes,
        peers={"eager and copy_": lambda: theirs.copy_(kernel_forms.merged(layer.base, *layer.factors, layer.numbers, SPARSITY))},
        sizes=layer.sizes,
    )


def quantile_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    layer = Layer(shape, SIZES[1])
    return Contest(
        ours=lambda: taskloom.kernel_quantile(*layer.factors, sparsity=SPARSITY, **layer.named),
        bytes=total_bytes(*layer.factors),
        peers={
            "entries and torch.quantile": lambda: kernel_forms.quantile(kernel_forms.entries(*layer.factors, layer.numbers).abs(), SPARSITY)
        },
        sizes=layer.sizes,
    )


def _eager_gradients(layer: Layer, use: Callable[[Tensor], Tensor], upstream: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Gradients through the eager form, its forward included: it has no other way to what it kept."""
    leaves = layer.learned()
    weight = kernel_forms.merged(layer.base, *leaves[:3], leaves[3:], SPARSITY)
    return torch.autograd.grad(use(weight), (*leaves, *others), upstream)


def backward_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    layer = Layer(shape, SIZES[1])
    threshold, row_stats = layer.statistics()
    upstream = weights(layer.shape, 5)

    def eager() -> tuple[Tensor, ...]:
        a, b, coef, *numbers = _eager_gradients(layer, lambda weight: weight, upstream)
        return a, b, coef, torch.stack(numbers)

    return Contest(
        ours=lambda: kernel_merge_backward(upstream, *layer.factors, threshold, row_stats, **layer.named),
        bytes=upstream.nbytes,
        peers={"eager, forward and backward": eager},
        sizes=layer.sizes,
        tolerance=1e-4,
    )


def linear_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    layer = Layer(shape, SIZES[1])
    return Contest(
        ours=lambda: taskloom.kernel_linear(layer.x, *layer.factors, sparsity=SPARSITY, base=layer.base, **layer.named),
        bytes=total_bytes(layer.x, layer.base) + layer.x.shape[0] * layer.shape[0] * 4,
        peers={"eager": lambda: layer.x @ kernel_forms.merged(layer.base, *layer.factors, layer.numbers, SPARSITY).T},
        sizes=layer.sizes | {"tokens": layer.x.shape[0]},
        tolerance=1e-5,
    )


def linear_backward_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    layer = Layer(shape, SIZES[1])
    threshold, row_stats = layer.statistics()
    upstream = weights((layer.x.shape[0], layer.shape[0]), 5)

    def eager() -> tuple[Tensor, ...]:
        x, base = layer.x.clone().requires_grad_(), layer.base.clone().requires_grad_()
        leaves = layer.learned()
        y = x @ kernel_forms.merged(base, *leaves[:3], leaves[3:], SPARSITY).T
        for_x, a, b, coef, *numbers, for_base = torch.autograd.grad(y, (x, *leaves, base), upstream)
        return for_x, a, b, coef, torch.stack(numbers), for_base

    return Contest(
        ours=lambda: kernel_linear_backward(upstream, layer.x, *layer.factors, threshold, row_stats, base=layer.base, **layer.named),
        bytes=total_bytes(layer.x, upstream, layer.base),
        peers={"eager, forward and backward": eager},
        sizes=layer.sizes | {"tokens": layer.x.shape[0]},
        tolerance=1e-4,
    )


_ONLY = (torch.float32,)

ROWS = (
    *(Row("kernel_merge", partial(merge_contest, size), f"{size[0]} by {size[1]}", _ONLY) for size in SIZES),
    Row("kernel_merge_out", merge_out_contest, "", _ONLY),
    Row("kernel_quantile", quantile_contest, "", _ONLY),
    Row("kernel_merge_backward", backward_contest, "", _ONLY),
    Row("kernel_linear", linear_contest, "", _ONLY),
    Row("kernel_linear_backward", linear_backward_contest, "", _ONLY),
)

"""One call of ``block_scale_merge`` for frozen blocks and vectors, of which autograd sees the coefficients alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from taskloom.methods.merging.atlas.blocks import Pool
from taskloom.methods.merging.atlas.partition import Partition
from taskloom.ops import block_scale_merge
from taskloom.ops._backends import active_transform, kernel
from taskloom.ops.masked import block_scale_merge_backward


class Composer:
    """What composes a model's blocks: its frozen vectors and groups, checked once instead of at every call."""

    def __init__(self, pool: Pool, partition: Partition) -> None:
        self.deltas = pool.deltas
        self.flat = list(chain.from_iterable(pool.deltas))
        self.parts = list(partition.parts or ())
        self.groups = partition.groups

    def __deepcopy__(self, memo: dict[int, Any]) -> Composer:
        return self

    def __call__(self, base: list[Tensor], coef: Tensor) -> list[Tensor]:
        """The composed blocks; ``coef`` is ``[n, m]`` or ``[n, m, K]``."""
        full = coef if coef.dim() == 3 else coef[:, :, None]
        # The general way has a graph for every tensor of the call, a node's worth of time each; compiled code has none of that.
        if is_compiling() or active_transform() is not None or any(block.requires_grad for block in base):
            return self._general(base, full)
        with torch.no_grad():
            # The vectors and groups are on one device: one of them stands for all, as hundreds of blocks make thousands of tensors.
            run = kernel("block_scale_merge", *base, self.flat[0], full)
        if run is None:
            return self._general(base, full)
        if torch.is_grad_enabled() and full.requires_grad:
            function: Any = _Compose
            return list(function.apply(full, base, self, run))
        with torch.no_grad():
            merged: list[Tensor] = run(base, self.flat, full, self.parts)
        return merged

    def _general(self, base: list[Tensor], full: Tensor) -> list[Tensor]:
        merged = block_scale_merge(base, self.deltas, full, self.parts or None)
        assert isinstance(merged, list)
        return merged

    def products(self, gradients: Sequence[Tensor]) -> Tensor:
        """The gradients of the coefficients from those of the composed blocks: float64 ``[n, m, K]``."""
        listed = list(gradients)
        if torch.is_grad_enabled() and any(one.requires_grad for one in listed):
            return block_scale_merge_backward(listed, self.deltas, self.parts, self.groups)
        with torch.no_grad():
            run = kernel("block_scale_merge_backward", *listed, self.flat[0])
            if run is None:
                return block_scale_merge_backward(listed, self.deltas, self.parts, self.groups)
            products: Tensor = run(listed, self.flat, self.parts, self.groups)
        return products


class _Compose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coef: Tensor, base: list[Tensor], composer: Composer, run: Callable[..., Any]) -> tuple[Tensor, ...]:
        composed = tuple(run(base, composer.flat, coef, composer.parts))
        ctx.composer, ctx.dtype = composer, coef.dtype
        # Not for the gradient, which needs no weights: for as long as the graph lives, installed() finds them here.
        ctx.save_for_backward(*composed)
        return composed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.composer.products(gradients).to(ctx.dtype), None, None, None

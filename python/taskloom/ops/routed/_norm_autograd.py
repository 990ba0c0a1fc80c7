"""Autograd of the routed norms: what they keep for backward, and the call of their backward ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from taskloom.ops.routed._windows import Window


def keep_norm(
    ctx: Any,
    x: Tensor,
    parameters: tuple[Tensor | None, Tensor | None],
    numbers: tuple[int, ...],
    window: Window,
    outside: bool,
    statistics: tuple[Tensor, Tensor],
) -> None:
    """Keep x and the statistics; ``numbers`` are what the backward op takes before the window."""
    start, width, widths = window
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *parameters, start, widths, *statistics)
    ctx.numbers, ctx.width, ctx.outside = numbers, width, outside


def norm_gradients(
    ctx: Any, run: Callable[..., Any], gradient: Tensor | None, for_mean: Tensor | None, for_rstd: Tensor | None, others: int
) -> tuple[Tensor | None, ...]:
    """What backward gives for x and the two parameters, None where it is not wanted, and for ``others`` more arguments."""
    x, first, second, start, widths, mean, rstd = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    slopes = x.new_zeros(x.shape) if gradient is None else gradient
    found = run(
        *(slopes, x, first, second, *ctx.numbers, start, ctx.width, widths),
        *(mean, rstd, for_mean, for_rstd, ctx.outside, wanted[0], wanted[1] or wanted[2]),
    )
    return (*(one if want else None for one, want in zip(found, wanted, strict=True)), *[None] * others)

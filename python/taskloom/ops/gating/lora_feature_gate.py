"""A gate of features by low-rank maps, each in [0, 2], mixed by weights of the row."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from taskloom.ops._backends import kernel
from taskloom.ops._checks import check_floating, check_shape
from taskloom.ops._register import register
from taskloom.reference import gating as reference
from taskloom.reference.arithmetic import accumulation_dtype


def _check(op: str, x: Tensor, down: Tensor, up: Tensor, weight: Tensor) -> None:
    for name, one in (("x", x), ("down", down), ("up", up), ("weight", weight)):
        check_floating(op, name, one)
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"{op}: x: expected shape [B, D] with at least one feature, got {tuple(x.shape)}")
    if down.dim() != 3 or down.shape[1] != x.shape[1] or down.shape[0] == 0 or down.shape[2] == 0:
        raise ValueError(
            f"{op}: down: expected shape [L, {x.shape[1]}, r] with L and r at least 1 for x {tuple(x.shape)}, got {tuple(down.shape)}"
        )
    maps, features, rank = down.shape
    check_shape(op, "up", up, (maps, rank, features), "down says")
    check_shape(op, "weight", weight, (x.shape[0], maps), "x's rows and down's maps say")


def lora_feature_gate(x: Tensor, down: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """Gate the features of each row by a weighted sum of low-rank maps: ``x * sum_l weight[b, l] * 2 sigmoid((x down_l) up_l)``.

    Parameters
    ----------
    x
        ``[B, D]``; float32, bfloat16, float16 or float64.
    down, up
        ``[L, D, r]`` and ``[L, r, D]`` of any of these dtypes: the factors of L maps.
    weight
        ``[B, L]`` of any of these dtypes: the maps' shares in each row's gate, as a softmax makes them; they are used as they are.

    Returns
    -------
    Tensor
        ``[B, D]`` in x's dtype, computed in float32 (float64 where a tensor is float64) and rounded once.

    Raises
    ------
    TypeError
        If a tensor has another dtype.
    ValueError
        If shapes do not fit, or there is no map, rank or feature.

    Notes
    -----
    Source: the feature gate of HoME, arXiv 2408.05430.

    Where ``up`` is 0 each map's gate is exactly 1 and the result is x times the weights' sum, added up in order: exactly x where that sum
    is exactly 1, which a softmax's is but for a rounding (:class:`taskloom.nn.FeatureGate` makes it so).

    The maps ``[B, L, D]`` are not stored: forward keeps the products ``x down``, ``[B, L r]``, and backward computes the sigmoids again.
    Once differentiable with respect to all four; twice with ``taskloom.backend("reference")``. On the CPU the thin products are torch's
    own, whose last bits may depend on the number of threads.
    """
    op = "lora_feature_gate"
    _check(op, x, down, up, weight)
    run = kernel(op, x, down, up, weight) or reference.lora_feature_gate
    y: Tensor = run(x, down, up, weight)[0]
    return y


def lora_feature_gate_backward(
    gradient: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    weight: Tensor,
    inner: Tensor,
    *,
    for_x: bool = True,
    for_down: bool = True,
    for_up: bool = True,
    for_weight: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of :func:`lora_feature_gate`'s x, down, up and weight.

    Parameters
    ----------
    gradient, x
        ``[B, D]``.
    down, up, weight
        As in forward.
    inner
        The products ``x down`` of forward, ``[B, L r]`` in the dtype of the arithmetic.
    for_x, for_down, for_up, for_weight
        Which gradients are wanted. Default: all.

    Returns
    -------
    dx, ddown, dup, dweight : Tensor
        In the shapes and dtypes of x, down, up and weight; empty where not wanted. Rows are added up in a fixed order.

    Notes
    -----
    Source: this library. Not differentiable.
    """
    op = "lora_feature_gate_backward"
    _check(op, x, down, up, weight)
    check_shape(op, "gradient", gradient, x.shape, "x")
    check_shape(op, "inner", inner, (x.shape[0], down.shape[0] * down.shape[2]), "x's rows and down's maps and ranks say")
    run = kernel(op, gradient, x, down, up, weight, inner) or reference.lora_feature_gate_backward
    found: tuple[Tensor, Tensor, Tensor, Tensor] = run(gradient, x, down, up, weight, inner, for_x, for_down, for_up, for_weight)
    return found


def _fake_gate(x: Tensor, down: Tensor, up: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    inner = x.new_empty((x.shape[0], down.shape[0] * down.shape[2]), dtype=accumulation_dtype(x, down, up, weight))
    return x.new_empty(x.shape), inner


def _fake_backward(
    gradient: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    weight: Tensor,
    inner: Tensor,
    for_x: bool,
    for_down: bool,
    for_up: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if for_x else (0,)),
        down.new_empty(down.shape if for_down else (0,)),
        up.new_empty(up.shape if for_up else (0,)),
        weight.new_empty(weight.shape if for_weight else (0,)),
    )


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, gradient: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
    wanted = tuple(bool(one) for one in ctx.needs_input_grad)
    found = ctx.ops.lora_feature_gate_backward.default(gradient, *ctx.saved_tensors, *wanted)
    return tuple(one if want else None for one, want in zip(found, wanted, strict=True))


register("lora_feature_gate", fake=_fake_gate, backward=_backward, setup_context=_setup)
register("lora_feature_gate_backward", fake=_fake_backward)

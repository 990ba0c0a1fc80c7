"""A linear layer that runs on a prefix of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from taskloom.ops._backends import kernel
from taskloom.ops._register import implement_on_cpu, register
from taskloom.ops.routed import _prefix_products
from taskloom.ops.routed._prefix_checks import check_inputs, check_weights, check_width
from taskloom.reference import routed as reference


def prefix_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out_features: int | None = None) -> Tensor:
    """Apply the part of a linear layer that its first inputs and outputs make: ``x weight[:out, :in]^T + bias[:out]``.

    Parameters
    ----------
    x
        ``[..., in]``, where ``in`` is how many of the layer's inputs are active, at most ``C``; float32, bfloat16, float16 or float64. A
        view of a wider tensor is read where it is.
    weight, bias
        The whole layer's, ``[O, C]`` and ``[O]`` (default None), in x's dtype. They are read by stride; no slice is copied.
    out_features
        How many outputs are active, 1 to O. Default None: all.

    Returns
    -------
    Tensor
        ``[..., out_features]`` in x's dtype. It does not depend on entries of weight and bias outside the prefix.

    Raises
    ------
    TypeError
        If a tensor has another dtype, or ``out_features`` is not an integer.
    ValueError
        If shapes do not fit, or a width is not in its range.

    Notes
    -----
    Source: slimmable layers, Yu et al., ICLR 2019, arXiv 1812.08928; used by controllable multi-task networks, arXiv 2308.11744.

    Once differentiable; the gradients of weight and bias have their whole shapes and are exactly zero outside the prefix, so that
    backward passes at several widths add. Twice differentiable with ``taskloom.backend("reference")``. The products are torch's own, on
    views (their bits may depend on the number of threads).
    """
    op = "prefix_linear"
    check_weights(op, x, weight, bias, 2)
    if x.dim() == 0:
        raise ValueError(f"{op}: x: expected at least one dimension, got a scalar")
    check_inputs(op, x.shape[-1], weight.shape[1])
    outputs = check_width(op, "out_features", out_features, weight.shape[0])
    run = kernel(op, x, weight) if bias is None else kernel(op, x, weight, bias)
    if run is None:
        return reference.prefix_linear(x, weight, bias, outputs)
    if x.dim() == 2:
        y: Tensor = run(x, weight, bias, outputs)
        return y
    found: Tensor = run(x.reshape(-1, x.shape[-1]), weight, bias, outputs)
    return found.reshape(*x.shape[:-1], outputs)


def prefix_linear_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, needed: Sequence[bool] = (True, True, False)
) -> list[Tensor]:
    """The gradients of :func:`prefix_linear`'s x, weight and bias.

    Parameters
    ----------
    gradient, x
        ``[N, out]`` and ``[N, in]``; they tell the prefix.
    weight, bias
        As in forward; bias gives shape and dtype only.
    needed
        Whether each of the three is wanted. Default: those of x and weight.

    Returns
    -------
    list of Tensor
        Those that are wanted, in the shape and dtype of what they are the gradients of: zero outside the prefix.

    Notes
    -----
    Source: this library. Not differentiable.
    """
    op = "prefix_linear_backward"
    run = kernel(op, gradient, x, weight)
    if run is None:
        return reference.prefix_linear_backward(gradient, x, weight, bias, needed)
    found: list[Tensor] = run(gradient, x, weight, bias, list(needed))
    return found


def fake_gradients(x: Tensor, weight: Tensor, bias: Tensor | None, needed: Sequence[bool]) -> list[Tensor]:
    """Whole tensors of what is wanted, contiguous."""
    given = (x, weight, x if bias is None else bias)
    return [one.new_empty(one.shape) for one, wanted in zip(given, needed, strict=True) if wanted]


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty((x.shape[0], out_features))


def _fake_backward(gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, needed: Sequence[bool]) -> list[Tensor]:
    return fake_gradients(x, weight, bias, needed)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, int], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def spread_found(needed: Sequence[bool], found: Sequence[Tensor], others: int) -> tuple[Tensor | None, ...]:
    """What a backward returned for the tensors that need it, None for the others and for ``others`` more arguments."""
    remaining = iter(found)
    return (*(next(remaining) if wanted else None for wanted in needed), *(None,) * others)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    needed = [bool(one) for one in ctx.needs_input_grad[:3]]
    found = ctx.ops.prefix_linear_backward.default(gradient, x, weight, bias, needed) if any(needed) else ()
    return spread_found(needed, found, 1)


implement_on_cpu("prefix_linear", _prefix_products.prefix_linear)
implement_on_cpu("prefix_linear_backward", _prefix_products.prefix_linear_backward)
register("prefix_linear", fake=_fake, backward=_backward, setup_context=_setup)
register("prefix_linear_backward", fake=_fake_backward)

"""A softmax gate over very many linear experts, one tile of them after the other."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from taskloom.ops._backends import kernel
from taskloom.ops._checks import check_floating, check_shape, plain_number
from taskloom.ops._register import register
from taskloom.reference import gating as reference
from taskloom.reference.arithmetic import accumulation_dtype


class SoftmaxMix(NamedTuple):
    """What :func:`stream_softmax_mix` returns.

    Attributes
    ----------
    pred
        ``[B, K]``: the prediction of each target from the pairs before it.
    lse
        ``[B, K]``: the log of the summed likelihoods of these pairs, without the normal density's constant.
    """

    pred: Tensor
    lse: Tensor


def _check(op: str, x: Tensor, y: Tensor, experts: Tensor, sigma: float) -> None:
    for name, tensor in (("x", x), ("y", y), ("experts", experts)):
        check_floating(op, name, tensor)
    if x.dim() != 3 or x.shape[2] == 0:
        raise ValueError(f"{op}: x: expected shape [B, K, D] with D of at least 1, got {tuple(x.shape)}")
    check_shape(op, "y", y, x.shape[:2], "x's sequences and pairs")
    if experts.dim() != 2 or experts.shape[0] == 0 or experts.shape[1] != x.shape[2]:
        raise ValueError(f"{op}: experts: expected shape [M, {x.shape[2]}] with at least one expert, got {tuple(experts.shape)}")
    if not 1e-15 <= sigma <= 1e15:
        raise ValueError(f"{op}: sigma: expected 1e-15 to 1e+15, got {sigma}")


def stream_softmax_mix(x: Tensor, y: Tensor, experts: Tensor, sigma: float) -> SoftmaxMix:
    """Predict each target by a softmax gate over all experts, by how well they predicted the pairs before it.

    ``c[k, m] = -sum_{j < k} (y[j] - experts[m] . x[j])**2 / (2 sigma**2)``, ``pred[k] = sum_m softmax_m(c[k]) * (experts[m] . x[k])`` and
    ``lse[k] = logsumexp_m(c[k])``, for each sequence of the batch.

    Parameters
    ----------
    x
        ``[B, K, D]``: inputs of the pairs; float32, bfloat16, float16 or float64.
    y
        ``[B, K]``: their targets, of any of these dtypes.
    experts
        ``[M, D]`` with at least one row: the weights of linear functions, of any of these dtypes.
    sigma
        The noise's standard deviation, 1e-15 to 1e+15.

    Returns
    -------
    SoftmaxMix
        ``pred`` and ``lse``, float32, or float64 where a tensor is float64. The first prediction is the experts' mean, and no prediction
        depends on its own target or on later pairs.

    Raises
    ------
    TypeError
        If a tensor has another dtype.
    ValueError
        If shapes do not fit, there is no expert or sigma is out of range.

    Notes
    -----
    Source: the discrete minimum mean squared error estimator (dMMSE) of Raventos et al. 2023, arXiv 2306.15063.

    ``[B, K, M]`` is never stored: the experts go by in tiles with a running maximum, as in flash attention, and on the CPU the bits do not
    depend on the number of threads or the CPU level. Differentiable once with respect to x, y and experts, by computing the tiles again;
    twice with ``taskloom.backend("reference")``, which stores all of it.
    """
    op = "stream_softmax_mix"
    sigma = plain_number(op, "sigma", sigma)
    _check(op, x, y, experts, sigma)
    run = kernel(op, x, y, experts) or reference.stream_softmax_mix
    return SoftmaxMix(*run(x, y, experts, sigma))


def stream_softmax_mix_backward(
    for_pred: Tensor | None,
    for_lse: Tensor | None,
    x: Tensor,
    y: Tensor,
    experts: Tensor,
    pred: Tensor,
    lse: Tensor,
    sigma: float,
    *,
    for_x: bool = True,
    for_y: bool = True,
    for_experts: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`stream_softmax_mix`.

    Parameters
    ----------
    for_pred, for_lse
        ``[B, K]``, the gradients of the op's results; None: none.
    x, y, experts, sigma
        As in the op.
    pred, lse
        What it returned.
    for_x, for_y, for_experts
        Which gradients are wanted. Default: all.

    Returns
    -------
    dx, dy, dexperts : Tensor
        In the shapes and dtypes of x, y and experts; empty where not wanted.

    Notes
    -----
    Source: this library. Not differentiable.
    """
    op = "stream_softmax_mix_backward"
    sigma = plain_number(op, "sigma", sigma)
    _check(op, x, y, experts, sigma)
    dtype = accumulation_dtype(x, y, experts)
    slopes = [one for one in (for_pred, for_lse) if one is not None]
    for name, tensor in (("for_pred", for_pred), ("for_lse", for_lse), ("pred", pred), ("lse", lse)):
        if tensor is None:
            continue
        check_floating(op, name, tensor)
        check_shape(op, name, tensor, y.shape, "y")
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name}: expected {dtype}, got {tensor.dtype}")
    run = kernel(op, x, y, experts, pred, lse, *slopes) or reference.stream_softmax_mix_backward
    found: tuple[Tensor, Tensor, Tensor] = run(for_pred, for_lse, x, y, experts, pred, lse, sigma, for_x, for_y, for_experts)
    return found


def _fake_mix(x: Tensor, y: Tensor, experts: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(x, y, experts)
    return y.new_empty(y.shape, dtype=dtype), y.new_empty(y.shape, dtype=dtype)


def _fake_backward(
    for_pred: Tensor | None,
    for_lse: Tensor | None,
    x: Tensor,
    y: Tensor,
    experts: Tensor,
    pred: Tensor,
    lse: Tensor,
    sigma: float,
    for_x: bool,
    for_y: bool,
    for_experts: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = ((x, for_x), (y, for_y), (experts, for_experts))
    dx, dy, dexperts = (one.new_empty(one.shape if want else (0,)) for one, want in wanted)
    return dx, dy, dexperts


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, experts, sigma = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, y, experts, *output)
    ctx.sigma = sigma


def _backward(ctx: Any, for_pred: Tensor | None, for_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = tuple(bool(one) for one in ctx.needs_input_grad[:3])
    found = ctx.ops.stream_softmax_mix_backward.default(for_pred, for_lse, *ctx.saved_tensors, ctx.sigma, *wanted)
    return (*(one if want else None for one, want in zip(found, wanted, strict=True)), None)


register("stream_softmax_mix", fake=_fake_mix, backward=_backward, setup_context=_setup)
register("stream_softmax_mix_backward", fake=_fake_backward)

"""Normalisation of a prefix of a layer's channels, with a ReLU behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from taskloom.ops._backends import kernel
from taskloom.ops._checks import check_floating
from taskloom.ops._register import implement_on_cpu, register
from taskloom.ops.routed import _prefix_norms
from taskloom.ops.routed._conv_checks import check_integer
from taskloom.ops.routed._prefix_checks import empty_result
from taskloom.ops.routed.prefix_linear import fake_gradients, spread_found
from taskloom.reference import routed as reference
from taskloom.reference.arithmetic import accumulation_dtype

KINDS = ("layer", "group", "batch")


def _check(op: str, x: Tensor, kind: str, groups: int, vectors: dict[str, Tensor | None]) -> None:
    check_floating(op, "x", x)
    if x.dim() < 2:
        raise ValueError(f"{op}: x: expected shape (N, C, ...), got {tuple(x.shape)}")
    if kind not in KINDS:
        raise ValueError(f"{op}: kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    check_integer(op, "groups", groups)
    if kind != "group" and groups != 1:
        raise ValueError(f"{op}: groups: expected 1 for kind {kind!r}, got {groups}")
    if groups < 1 or x.shape[1] % groups or x.shape[1] == 0:
        raise ValueError(f"{op}: groups: expected a divisor of x's {x.shape[1]} channels, got {groups}")
    for name, one in vectors.items():
        if one is None:
            continue
        check_floating(op, name, one)
        if one.dim() != 1 or one.shape[0] < x.shape[1]:
            raise ValueError(f"{op}: {name}: expected at least {x.shape[1]} entries, the channels of x, got shape {tuple(one.shape)}")
    if (vectors["running_mean"] is None) != (vectors["running_var"] is None):
        raise ValueError(f"{op}: running_mean, running_var: expected both or none")
    if kind != "batch" and vectors["running_mean"] is not None:
        raise ValueError(f"{op}: running_mean: expected None for kind {kind!r}, which has no running statistics")


def normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    groups: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`prefix_norm` with its statistics: the mean and the biased variance, [c] or [N, groups], which have no gradient."""
    op = "prefix_norm"
    _check(op, x, kind, groups, {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var})
    if kind == "batch" and running_mean is None and x.shape[0] * x[:1, :1].numel() <= 1:
        raise ValueError(f"{op}: x: expected more than one value per channel for a batch's statistics, got {tuple(x.shape)}")
    vectors = [one for one in (weight, bias, running_mean, running_var) if one is not None]
    run = kernel(op, x, *vectors) or reference.prefix_norm
    found: tuple[Tensor, Tensor, Tensor] = run(x, weight, bias, kind, groups, running_mean, running_var, eps, relu)
    return found


def prefix_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str = "layer",
    groups: int = 1,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    eps: float = 1e-5,
    relu: bool = False,
) -> Tensor:
    """Normalise the active channels of a layer: ``(x - mean) / sqrt(var + eps) * weight[:c] + bias[:c]``.

    Parameters
    ----------
    x
        ``[N, c, ...]``, the active channels, at most the layer's C; float32, bfloat16, float16 or float64.
    weight, bias
        The whole layer's, ``[C]``, any of these dtypes; default None: one and zero.
    kind
        What statistics are taken over. ``"layer"`` (default): all channels and positions of a sample, which is group normalisation with
        one group, and for rows ``[N, c]`` what nn.LayerNorm does; ``"group"``: those of a group of a sample's channels; ``"batch"``: a
        channel of all samples.
    groups
        How many groups the active channels make, for ``"group"``. Default 1.
    running_mean, running_var
        ``[C]``: for ``"batch"``, statistics to use in place of the batch's own. Default None.
    eps
        Added to the variance. Default 1e-5.
    relu
        Whether the positive part is taken after it. Default False.

    Returns
    -------
    Tensor
        ``[N, c, ...]`` in x's dtype. Statistics are float32 (float64 where a tensor is float64); the result is rounded once.

    Raises
    ------
    TypeError
        If a tensor has another dtype.
    ValueError
        If shapes do not fit, the groups do not divide the channels, or a batch has one value per channel.

    Notes
    -----
    Source: batch normalisation for slimmable layers, Yu and Huang, ICCV 2019, arXiv 1903.05134; groups, Wu and He, arXiv 1803.08494.

    Once differentiable, with respect to x, weight and bias; twice with ``taskloom.backend("reference")``. Backward computes the sign of
    the output again, so that only x and the statistics are kept.
    """
    return normalise(x, weight, bias, kind, groups, running_mean, running_var, eps, relu)[0]


def prefix_norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    *,
    kind: str = "layer",
    running: bool = False,
    eps: float = 1e-5,
    relu: bool = False,
    needed: Sequence[bool] = (True, True, True),
) -> list[Tensor]:
    """The gradients of :func:`prefix_norm`'s x, weight and bias.

    Parameters
    ----------
    gradient, x
        ``[N, c, ...]``.
    weight, bias
        As in forward.
    mean, var
        The statistics of forward, ``[c]`` or ``[N, groups]``.
    kind, eps, relu
        As in forward.
    running
        Whether the statistics are constants. Default False: they depend on x.
    needed
        Whether each of the three is wanted. Default: all.

    Returns
    -------
    list of Tensor
        Those that are wanted, in the shape and dtype of what they are the gradients of; weight's and bias's are zero from c on.

    Notes
    -----
    Source: this library. Not differentiable.
    """
    op = "prefix_norm_backward"
    vectors = [one for one in (weight, bias) if one is not None]
    run = kernel(op, gradient, x, mean, var, *vectors) or reference.prefix_norm_backward
    found: list[Tensor] = run(gradient, x, weight, bias, mean, var, kind, running, eps, relu, list(needed))
    return found


def _fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    groups: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(x, weight, bias, running_mean, running_var)
    shape = (x.shape[1],) if kind == "batch" else (x.shape[0], groups)
    return empty_result(x, x.shape), x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _fake_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    kind: str,
    running: bool,
    eps: float,
    relu: bool,
    needed: Sequence[bool],
) -> list[Tensor]:
    return fake_gradients(x, x if weight is None else weight, bias, needed)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, kind, _, running_mean, _, eps, relu = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.settings = (kind, running_mean is not None, eps, relu)


def _backward(ctx: Any, gradient: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
    needed = [bool(one) for one in ctx.needs_input_grad[:3]]
    run = ctx.ops.prefix_norm_backward.default
    found = run(gradient, *ctx.saved_tensors, *ctx.settings, needed) if any(needed) else ()
    return spread_found(needed, found, 6)


implement_on_cpu("prefix_norm", _prefix_norms.prefix_norm)
implement_on_cpu("prefix_norm_backward", _prefix_norms.prefix_norm_backward)
register("prefix_norm", fake=_fake, backward=_backward, setup_context=_setup)
register("prefix_norm_backward", fake=_fake_backward)

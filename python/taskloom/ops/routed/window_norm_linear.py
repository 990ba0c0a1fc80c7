"""A linear map of modulated rows whose channels outside of a window count as zeros, reading only the window's columns for each row."""

from __future__ import annotations

import torch
from torch import Tensor

from taskloom.ops._backends import describe_path
from taskloom.ops._checks import cast_layer_for_autocast
from taskloom.ops.routed._kernel_runs import sees_at_least, share_seen
from taskloom.ops.routed._products import product_dtype
from taskloom.ops.routed._windows import Window, window_of
from taskloom.ops.routed.window_layer_norm import as_rows, check_modulation, check_rows, normalised
from taskloom.ops.routed.window_linear import check_weight, describe_linear, window_linear
from taskloom.reference.routed.windows import window_mask

# From this share of the channels on, torch's own product of all of them is faster on a CPU that multiplies bfloat16: a window's factors are
# copied there. What benchmarks/bench_window_crossover.py showed.
DENSE_FROM = {torch.bfloat16: 0.7}


def _is_dense(x: Tensor, dtype: torch.dtype, window: Window) -> bool:
    """Whether all channels are multiplied."""
    return x.is_cpu and dtype in DENSE_FROM and product_dtype(dtype) == dtype and sees_at_least(DENSE_FROM[dtype], x.shape[-1], window)


def _constants(weight: Tensor, bias: Tensor | None, shift: Tensor | None, scale: Tensor | None, window: Window, samples: int) -> Tensor:
    """What the channels outside of the window add to each output of a sample, and that times -mean / deviation: [N, 2, O]."""
    outside = ~window_mask(samples, weight.shape[1], *window)
    first = weight.new_zeros((samples, weight.shape[1])) if shift is None else shift.to(weight.dtype)
    second = torch.ones_like(first) if scale is None else (1 + scale).to(weight.dtype)
    both = torch.where(outside[:, None], torch.stack([first, second], 1), 0)
    constants = torch.nn.functional.linear(both, weight)
    if bias is None:
        return constants
    return constants + torch.stack([bias, torch.zeros_like(bias)])


def window_norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    start: Tensor | int,
    width: Tensor | int,
    eps: float = 1e-6,
) -> Tensor:
    """Apply a linear map to normalised, modulated rows: ``linear(window_layer_norm(x, shift, scale), weight, bias)``, exactly.

    Outside of its window a row holds ``-mean / deviation * (1 + scale) + shift``, which differs from row to row only by its first factor.
    Their part is therefore two products of ``weight`` with vectors for each *sample*, and for each row one multiply-add an output.

    Parameters
    ----------
    x
        ``[N, ..., C]``, usually ``[N, P, C]``; float32, bfloat16, float16 or float64. Only the channels of a sample's window are read.
    weight, bias
        ``[O, C]`` and ``[O]`` in x's dtype; default bias None: zeros.
    shift, scale
        ``[N, C]`` of any of these dtypes; default None: zeros.
    start, width, eps
        As in :func:`taskloom.window_layer_norm`.

    Returns
    -------
    Tensor
        ``[N, ..., O]`` in x's dtype.

    Raises
    ------
    TypeError
        If a tensor has another dtype.
    ValueError
        If shapes do not fit or a window leaves the channels.

    Notes
    -----
    Source: the first sub-layer of DTR's masked DiT block, arXiv 2310.07138, with the masked channels taken out of the product; this
    library.

    A composition of :func:`taskloom.window_layer_norm`'s op (which here leaves the channels outside of the window 0), a product with a
    window and torch's own products: differentiable with respect to x (0 outside of the window), weight (also where no window is, for
    the constants depend on it), bias, shift and scale; twice with ``taskloom.backend("reference")``.

    On a CPU that multiplies bfloat16, windows in it of seven tenths of the channels or more are not taken out: torch's own product of all
    channels, on the whole result of the norm, is faster there. ``taskloom.explain("window_norm_linear", x, weight, start=start,
    width=width)`` says so.
    """
    op = "window_norm_linear"
    check_rows(op, x)
    check_modulation(op, x, shift, scale)
    # The norm sees x as it is; what autocast lowers is the product.
    lowered, weight, bias = cast_layer_for_autocast(x[:0], weight, bias)
    check_weight(op, lowered, weight, bias, -1, 2)
    window = window_of(op, len(x), x.shape[-1], start, width, x)
    if _is_dense(x, weight.dtype, window):
        rows = normalised(op, as_rows(x), shift, scale, window, eps, True)[0]
        return torch.nn.functional.linear(rows.to(weight.dtype), weight, bias).reshape(*x.shape[:-1], len(weight))
    u, mean, rstd = normalised(op, as_rows(x), shift, scale, window, eps, False)
    first, size, sizes = window
    product = window_linear(u, weight, start=first, width=size if sizes is None else sizes)
    offset = -(mean * rstd)
    factors = torch.stack([torch.ones_like(offset), offset], 2).to(product.dtype)
    y = torch.baddbmm(product, factors, _constants(weight, bias, shift, scale, window, len(x)))
    return y if x.dim() == 3 else y.reshape(*x.shape[:-1], y.shape[-1])


def _describe(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    start: Tensor | int,
    width: Tensor | int,
    eps: float = 1e-6,
) -> str:
    """What the CPU would do, in a sentence."""
    window = window_of("window_norm_linear", len(x), x.shape[-1], start, width, x)
    if _is_dense(x, weight.dtype, window):
        seen, least = share_seen(x.shape[-1], window), DENSE_FROM[weight.dtype]
        return f"torch's product of all channels: {seen:.0%} of them are seen, from {least:.0%} on"
    return f"constants of the channels outside, and {describe_linear(x, weight, bias, start=start, width=width)}"


describe_path("window_norm_linear", _describe, composed_with="window_linear")

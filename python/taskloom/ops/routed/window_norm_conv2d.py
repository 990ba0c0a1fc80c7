"""A convolution of normalised maps whose channels outside of a window count as zeros, reading only the window's channels."""

from __future__ import annotations

import torch
from torch import Tensor

from taskloom.ops._checks import cast_layer_for_autocast, check_floating
from taskloom.ops.routed._conv_checks import Pair
from taskloom.ops.routed._kernel_runs import sees_at_least
from taskloom.ops.routed._windows import Window, window_of
from taskloom.ops.routed.window_conv2d import conv_geometry, window_conv2d
from taskloom.ops.routed.window_group_norm import check_maps, normalised_maps
from taskloom.ops.routed.window_linear import check_weight
from taskloom.reference.routed.windows import window_mask

# From this share of the channels on, torch's own convolution of all of them is the faster one on a CPU: measured, docs/routed.md.
DENSE_FROM = {torch.float32: 0.5, torch.bfloat16: 0.25}


def _is_dense(x: Tensor, weight: Tensor, window: Window) -> bool:
    """Whether all channels are convolved: one kernel for all samples, against the columns of each sample's window."""
    pointwise = weight.shape[2:].numel() == 1
    return x.is_cpu and x.dtype in DENSE_FROM and not pointwise and sees_at_least(DENSE_FROM[x.dtype], x.shape[1], window)


def _taps_inside(size: int, outputs: int, taps: int, stride: int, padding: int, dilation: int, like: Tensor) -> Tensor:
    """Ones where an output's tap lies in the image, zeros where it lies in the padding: [outputs, taps]."""
    place = torch.arange(outputs, device=like.device)[:, None] * stride - padding
    place = place + torch.arange(taps, device=like.device) * dilation
    return ((place >= 0) & (place < size)).to(like.dtype)


def _channel_constants(
    mean: Tensor, rstd: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, window: Window, channels: int
) -> Tensor:
    """What the norm and SiLU make of a channel outside of the window, and 0 for those inside: [N, C]."""
    inner = -(mean * rstd).repeat_interleave(channels // mean.shape[1], 1)
    if norm_weight is not None:
        inner = inner * norm_weight
    if norm_bias is not None:
        inner = inner + norm_bias
    return torch.where(window_mask(len(mean), channels, *window), 0, torch.nn.functional.silu(inner))


def window_norm_conv2d(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    groups: int,
    start: Tensor | int,
    width: Tensor | int,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    eps: float = 1e-5,
) -> Tensor:
    """Convolve normalised maps: ``conv2d(window_group_norm_silu(x, norm_weight, norm_bias), weight, bias)``, exactly.

    Outside of its window a sample's channel is one constant. What such channels add to an output depends only on which taps of the kernel
    lie in the image: a table ``[N, O, kh, kw]``, one product of ``weight`` with a vector for each sample, summed over those taps.

    Parameters
    ----------
    x
        ``[N, C, H, W]``; float32, bfloat16, float16 or float64. Only the channels of a sample's window are read.
    norm_weight, norm_bias
        ``[C]`` of any of these dtypes, or None: ones and zeros.
    weight, bias
        ``[O, C, kh, kw]`` and ``[O]`` in x's dtype; default bias None: zeros.
    groups
        Groups of channels of the norm, a divisor of C.
    start, width
        As in :func:`taskloom.window_layer_norm`.
    stride, padding, dilation
        As in :func:`torch.nn.functional.conv2d`: one number or two. Defaults 1, 0, 1.
    eps
        Added to the variance. Default 1e-5.

    Returns
    -------
    Tensor
        ``[N, O, H', W']`` in x's dtype.

    Raises
    ------
    TypeError
        If a tensor has another dtype.
    ValueError
        If shapes or groups do not fit or a window leaves the channels.

    Notes
    -----
    Source: the first half of a masked residual block of ADM, for DTR, arXiv 2310.07138, with the masked channels taken out of the product;
    this library.

    A composition of :func:`taskloom.window_group_norm_silu`'s op, a convolution with a window and torch's own products: differentiable with
    respect to x (0 outside of the window), the norm's weight and bias, weight (also where no window is) and bias; twice with
    ``taskloom.backend("reference")``.

    On a CPU, windows of half the channels or more (bfloat16: a quarter) are not taken out: torch's convolution of all channels, on the
    whole result of the norm, is faster there than products of windows.
    """
    op = "window_norm_conv2d"
    check_floating(op, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{op}: x: expected shape [N, C, H, W], got {tuple(x.shape)}")
    check_maps(op, x, norm_weight, norm_bias, groups, ("norm_weight", "norm_bias"))
    # The norm sees x as it is; what autocast lowers is the convolution.
    lowered, weight, bias = cast_layer_for_autocast(x[:0], weight, bias)
    check_weight(op, lowered, weight, bias, 1, 4)
    steps, pads, spread = conv_geometry(op, x, weight, stride, padding, dilation)
    window = window_of(op, len(x), x.shape[1], start, width, x)
    if _is_dense(x, weight, window):
        y = normalised_maps(op, x.flatten(2), norm_weight, norm_bias, groups, window, eps, True)[0].reshape(x.shape)
        return torch.nn.functional.conv2d(y, weight, bias, (steps[0], steps[1]), (pads[0], pads[1]), (spread[0], spread[1]))
    u, mean, rstd = normalised_maps(op, x.flatten(2), norm_weight, norm_bias, groups, window, eps, False)
    first, size, sizes = window
    product = window_conv2d(
        u.reshape(x.shape),
        weight,
        bias,
        start=first,
        width=size if sizes is None else sizes,
        stride=steps,
        padding=pads,
        dilation=spread,
    )
    constants = _channel_constants(mean, rstd, norm_weight, norm_bias, window, x.shape[1]).to(product.dtype)
    table = torch.einsum("nc,ocij->noij", constants, weight)
    rows, columns = (
        _taps_inside(x.shape[2 + d], product.shape[2 + d], weight.shape[2 + d], steps[d], pads[d], spread[d], product) for d in range(2)
    )
    left = torch.matmul(rows, table).flatten(0, 1)
    flat = product.flatten(0, 1)
    return torch.baddbmm(flat, left, columns.T.expand(len(flat), -1, -1)).reshape(product.shape)

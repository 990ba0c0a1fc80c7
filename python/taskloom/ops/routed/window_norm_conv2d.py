"""A convolution of normalised maps whose channels outside of a window count as zeros, reading only the window's channels."""

from __future__ import annotations

import torch
from torch import Tensor

from taskloom.ops._checks import check_floating
from taskloom.ops.routed._sample_windows import Windows, outside_of, sample_windows
from taskloom.ops.routed.window_group_norm import check_maps, normalised_maps

Pair = int | tuple[int, int]


def _pair(op: str, name: str, value: Pair, least: int) -> tuple[int, int]:
    both = (value, value) if isinstance(value, int) else tuple(value)
    if len(both) != 2 or not all(isinstance(one, int) and one >= least for one in both):
        raise ValueError(f"{op}: {name}: expected one or two integers of at least {least}, got {value!r}")
    return both[0], both[1]


def _check_convolution(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 4:
        raise ValueError(f"{op}: x: expected shape [N, C, H, W], got {tuple(x.shape)}")
    check_floating(op, "weight", weight)
    if weight.dim() != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"{op}: weight: expected shape [O, {x.shape[1]}, kh, kw], a slice for each channel of x, got {tuple(weight.shape)}"
        )
    for name, one in (("weight", weight), ("bias", bias)):
        if one is not None and one.dtype != x.dtype:
            raise TypeError(f"{op}: {name}: expected {x.dtype} as x, got {one.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias: expected shape {tuple(weight.shape[:1])}, one for each filter, got {tuple(bias.shape)}")


def _taps_inside(size: int, outputs: int, taps: int, stride: int, padding: int, dilation: int, like: Tensor) -> Tensor:
    """Ones where an output's tap lies in the image, zeros where it lies in the padding: [outputs, taps]."""
    place = torch.arange(outputs, device=like.device)[:, None] * stride - padding
    place = place + torch.arange(taps, device=like.device) * dilation
    return ((place >= 0) & (place < size)).to(like.dtype)


def _channel_constants(
    mean: Tensor, rstd: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, windows: Windows, channels: int
) -> Tensor:
    """What the norm and SiLU make of a channel outside of the window, and 0 for those inside: [N, C]."""
    inner = -(mean * rstd).repeat_interleave(channels // mean.shape[1], 1)
    if norm_weight is not None:
        inner = inner * norm_weight
    if norm_bias is not None:
        inner = inner + norm_bias
    return torch.where(outside_of(windows, channels), torch.nn.functional.silu(inner), 0)


def window_norm_conv2d(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    groups: int,
    start: Tensor,
    width: int | Tensor,
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
    """
    op = "window_norm_conv2d"
    check_maps(op, x, norm_weight, norm_bias, groups, ("norm_weight", "norm_bias"))
    _check_convolution(op, x, weight, bias)
    windows = sample_windows(op, start, width, x.shape[0], x.shape[1])
    steps, pads, spread = _pair(op, "stride", stride, 1), _pair(op, "padding", padding, 0), _pair(op, "dilation", dilation, 1)
    u, mean, rstd = normalised_maps(op, x.flatten(2), norm_weight, norm_bias, groups, windows, eps, False)
    product = torch.nn.functional.conv2d(u.reshape(x.shape), weight, bias, steps, pads, spread)
    constants = _channel_constants(mean, rstd, norm_weight, norm_bias, windows, x.shape[1]).to(x.dtype)
    table = torch.einsum("nc,ocij->noij", constants, weight)
    rows, columns = (
        _taps_inside(x.shape[2 + d], product.shape[2 + d], weight.shape[2 + d], steps[d], pads[d], spread[d], x) for d in range(2)
    )
    left = torch.matmul(rows, table).flatten(0, 1)
    flat = product.flatten(0, 1)
    return torch.baddbmm(flat, left, columns.T.expand(len(flat), -1, -1)).reshape(product.shape)

"""A convolution of normalised maps whose channels outside of a window count as zeros, reading only the window's channels."""

from __future__ import annotations

import torch
from torch import Tensor

from taskloom.ops import _library
from taskloom.ops._backends import describe_path
from taskloom.ops._checks import cast_layer_for_autocast, check_floating
from taskloom.ops._compile import constant_under_compile
from taskloom.ops.routed import _conv_loops
from taskloom.ops.routed._conv_checks import Pair
from taskloom.ops.routed._conv_products import geometry_of
from taskloom.ops.routed._kernel_runs import sees_at_least, share_seen
from taskloom.ops.routed._products import product_dtype
from taskloom.ops.routed._windows import Window, window_of
from taskloom.ops.routed.window_conv2d import conv_geometry, describe_conv2d, window_conv2d
from taskloom.ops.routed.window_group_norm import check_maps, normalised_maps
from taskloom.ops.routed.window_linear import check_weight
from taskloom.reference.routed.windows import window_mask

# From this share of the channels on, torch's own convolution of all of them is the faster one on a CPU: where windows are convolved by
# loops, by products, and, for bfloat16, by oneDNN; and the same of images of few pixels, for which weights and constants count more. What
# benchmarks/bench_window_crossover.py showed.
DENSE_FROM = {"loops": 0.75, "products": 0.5, "onednn": 0.55}
DENSE_FROM_OF_SMALL = {"loops": 0.45, "products": 0.45, "onednn": 0.2}
SMALL_PIXELS = 128


@constant_under_compile
def _usual_way(bfloat16: bool) -> str:
    """How this CPU convolves windows but for odd layers."""
    if bfloat16 and product_dtype(torch.bfloat16) == torch.bfloat16:
        return "onednn"
    return "loops" if _library.cpu_level() == _conv_loops.LEVEL else "products"


def _dense_from(x: Tensor, weight: Tensor, geometry: tuple[list[int], list[int], list[int]]) -> float:
    """The share of the channels from which on a CPU convolves all of them, one kernel for all samples; above 1 where it never does."""
    sizes = geometry_of(x, weight, *geometry)
    if not x.is_cpu or weight.dtype not in (torch.float32, torch.bfloat16) or sizes.taps == 1:
        return 2.0
    shares = DENSE_FROM if sizes.outputs >= SMALL_PIXELS else DENSE_FROM_OF_SMALL
    return shares[_usual_way(weight.dtype == torch.bfloat16)]


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

    On a CPU, windows of three quarters of the channels or more (bfloat16: a bit more than half; less for small images) are not taken out:
    torch's convolution of all channels, on the whole result of the norm, is faster there. ``taskloom.explain("window_norm_conv2d", x,
    norm_weight, norm_bias, weight, groups=groups, start=start, width=width)`` says so.
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
    if sees_at_least(_dense_from(x, weight, (steps, pads, spread)), x.shape[1], window):
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


def _describe(
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
) -> str:
    """What the CPU would do, in a sentence."""
    op = "window_norm_conv2d"
    window = window_of(op, len(x), x.shape[1], start, width, x)
    least = _dense_from(x, weight, conv_geometry(op, x, weight, stride, padding, dilation))
    if sees_at_least(least, x.shape[1], window):
        return f"torch's convolution of all channels: {share_seen(x.shape[1], window):.0%} of them are seen, from {least:.0%} on"
    inner = describe_conv2d(x.to(weight.dtype), weight, bias, start=start, width=width, stride=stride, padding=padding, dilation=dilation)
    return f"constants of the channels outside, and {inner}"


describe_path("window_norm_conv2d", _describe, composed_with="window_conv2d")

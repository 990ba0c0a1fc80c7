"""What the ops on prefixes of channels compute on a CPU: torch's own products and convolutions, on views of the whole weight.

A convolution in float32 or bfloat16 is oneDNN's or a product, in csrc/routed/prefix_conv2d_ops.cpp. What oneDNN does not take (float64,
float16) is here: 1x1 with stride 1 is a matrix product for each sample, whose arguments are views; other convolutions are a product with
the unfolded samples, one at a time in one buffer. No result of one sample depends on how many others there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from taskloom.ops.routed._prefix_checks import empty_result, is_channels_last, output_size
from taskloom.reference.arithmetic import accumulation_dtype, without_autocast

Steps = tuple[Sequence[int], Sequence[int], Sequence[int]]


def _prefix(weight: Tensor, outputs: int, inputs: int, groups: int) -> tuple[Tensor, int]:
    """The part of a weight that a prefix uses, a view, and its groups."""
    return (weight[:outputs, :inputs], 1) if groups == 1 else (weight[:outputs], inputs // weight.shape[1])


def _whole(part: Tensor, like: Tensor) -> Tensor:
    """A fresh tensor of a whole weight's shape with the gradient of a prefix in it, else zeros."""
    whole = like.new_zeros(like.shape)
    whole[tuple(slice(size) for size in part.shape)].copy_(part)
    return whole


def _bias_gradient(gradient: Tensor, bias: Tensor, dims: tuple[int, ...]) -> Tensor:
    return _whole(gradient.sum(dims, dtype=accumulation_dtype(gradient)), bias)


@without_autocast
def prefix_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """One product with a view of the weight."""
    return torch.nn.functional.linear(x, weight[:out_features, : x.shape[1]], None if bias is None else bias[:out_features])


@without_autocast
def prefix_linear_backward(gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, needed: Sequence[bool]) -> list[Tensor]:
    """Two products, the weight's written to its place in the whole gradient."""
    found = []
    if needed[0]:
        found.append(gradient @ weight[: gradient.shape[1], : x.shape[1]])
    if needed[1]:
        whole = weight.new_zeros(weight.shape)
        torch.mm(gradient.T, x, out=whole[: gradient.shape[1], : x.shape[1]])
        found.append(whole)
    if needed[2] and bias is not None:
        found.append(_bias_gradient(gradient, bias, (0,)))
    return found


def _is_product(weight: Tensor, steps: Steps, groups: int) -> bool:
    """Whether a convolution is a matrix product of pixels."""
    return groups == 1 and weight.shape[2] * weight.shape[3] == 1 and all(one == 1 for one in steps[0]) and not any(steps[1])


def _pixels(x: Tensor) -> Tensor:
    """[N, C, H W] of an image; a view unless its rows are apart."""
    return x.flatten(2)


def _by_product(x: Tensor, part: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """A 1x1 convolution, a product for each sample: a batched one sums in another order for a batch of one."""
    matrix = part[:, :, 0, 0]
    for sample, target in zip(_pixels(x).unbind(), _pixels(out).unbind(), strict=True):
        torch.mm(matrix, sample, out=target)
    return out if bias is None else out.add_(bias[:, None, None])


def _unfolding(x: Tensor, weight: Tensor, steps: Steps) -> Callable[[Tensor], Tensor]:
    """What gives a sample's patches as [C kh kw, H' W'], all samples' in the same buffer."""
    stride, padding, dilation = steps
    _, channels, height, width = x.shape
    down, across = weight.shape[2:]
    padded = x.new_zeros((channels, height + 2 * padding[0], width + 2 * padding[1]))
    inner = padded[:, padding[0] : padding[0] + height, padding[1] : padding[1] + width]
    a, b, c = padded.stride()
    patches = padded.as_strided(
        (channels, down, across, *output_size("prefix_conv2d", x, weight, *steps)),
        (a, b * dilation[0], c * dilation[1], b * stride[0], c * stride[1]),
    )
    buffer = x.new_empty(patches.shape)

    def fill(sample: Tensor) -> Tensor:
        inner.copy_(sample)
        return buffer.copy_(patches).flatten(3).flatten(0, 2)

    return fill


def _by_unfolding(x: Tensor, part: Tensor, bias: Tensor | None, steps: Steps, out: Tensor) -> Tensor:
    """A convolution as a product with the patches of one sample after the other."""
    fill, matrix = _unfolding(x, part, steps), part.flatten(1)
    for sample, target in zip(x.unbind(), out.unbind(), strict=True):
        if target.is_contiguous():
            torch.mm(matrix, fill(sample), out=target.flatten(1))
        else:
            target.copy_((matrix @ fill(sample)).view(target.shape))
    return out if bias is None else out.add_(bias[:, None, None])


def convolve(x: Tensor, part: Tensor, bias: Tensor | None, steps: Steps, groups: int) -> Tensor:
    """The convolution of x with a view of a weight, laid out as x is."""
    stride, padding, dilation = steps
    sizes = (x.shape[0], part.shape[0], *output_size("prefix_conv2d", x, part, *steps))
    if 0 in sizes:
        return empty_result(x, sizes)
    last = is_channels_last(x)
    if not last and _is_product(part, steps, groups):
        return _by_product(x, part, bias, empty_result(x, sizes))
    if groups == 1:
        return _by_unfolding(x, part, bias, steps, empty_result(x, sizes))
    # The prefix of a grouped weight is contiguous, and torch's convolution copies nothing.
    found = torch.nn.functional.conv2d(x, part, bias, list(stride), list(padding), list(dilation), groups)
    # Where a size is 1, a layout has many strides.
    if found.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format) and 1 not in sizes:
        return found
    return empty_result(x, sizes).copy_(found)


@without_autocast
def prefix_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The convolution with a view of the weight."""
    part, active = _prefix(weight, out_channels, x.shape[1], groups)
    return convolve(x, part, None if bias is None else bias[:out_channels], (stride, padding, dilation), active)


def _product_gradients(gradient: Tensor, x: Tensor, part: Tensor, needed: Sequence[bool], whole: Tensor | None) -> Tensor | None:
    """A 1x1 convolution's: x's is returned, the weight's is added to its place in ``whole``, samples in order."""
    back, pixels = _pixels(gradient), _pixels(x)
    if needed[1] and whole is not None:
        target = whole[: part.shape[0], : part.shape[1], 0, 0]
        for one, sample in zip(back.unbind(), pixels.unbind(), strict=True):
            target.addmm_(one, sample.T)
    if not needed[0]:
        return None
    matrix, found = part[:, :, 0, 0].T, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for one, target in zip(back.unbind(), _pixels(found).unbind(), strict=True):
        torch.mm(matrix, one, out=target)
    return found


def gradients(
    gradient: Tensor, x: Tensor, part: Tensor, steps: Steps, groups: int, needed: Sequence[bool], whole: Tensor | None
) -> Tensor | None:
    """The gradient of x, where it is needed; that of ``part`` is added to its place in ``whole``."""
    if gradient.numel() == 0:
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device) if needed[0] else None
    if _is_product(part, steps, groups):
        return _product_gradients(gradient, x, part, needed, whole)
    stride, padding, dilation = steps
    for_x, for_part, _ = torch.ops.aten.convolution_backward(
        gradient, x, part, None, stride, padding, dilation, False, [0, 0], groups, [needed[0], needed[1], False]
    )
    if needed[1] and whole is not None:
        whole[: part.shape[0], : part.shape[1]].add_(for_part)
    return for_x.contiguous() if needed[0] else None


@without_autocast
def prefix_conv2d_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needed: Sequence[bool],
) -> list[Tensor]:
    """The gradients by torch's own products and convolutions, in float32 where x has 16 bits."""
    dtype = accumulation_dtype(x)
    part, active = _prefix(weight, gradient.shape[1], x.shape[1], groups)
    whole = torch.zeros(weight.shape, dtype=dtype, device=x.device) if needed[1] else None
    g = gradient.to(dtype)
    for_x = gradients(g, x.to(dtype), part.to(dtype), (stride, padding, dilation), active, needed, whole)
    found = [one.to(x.dtype) for one in (for_x, whole) if one is not None]
    if needed[2] and bias is not None:
        found.append(_bias_gradient(gradient, bias, (0, 2, 3)))
    return found

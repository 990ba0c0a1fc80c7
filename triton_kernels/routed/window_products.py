"""Launchers of window_linear, window_conv2d and their backwards: one set of kernels for both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from taskloom.ops.routed._conv_products import Geometry, geometry_of
from taskloom.ops.routed._windows import OutWindow, Window, assert_values
from taskloom.reference.arithmetic import accumulation_dtype
from taskloom.reference.routed.windows import out_mask
from taskloom.triton_kernels.launch import INTERPRETED, launch, raw
from taskloom.triton_kernels.routed.window_kernels import window_forward_kernel, window_input_kernel, window_weight_kernel

# Entries of one sample, and of a weight, that offsets of 32 bits reach, with those of a tile behind them.
MOST_ENTRIES = (1 << 31) - 1 - 512


def _blocks(exact: bool, names: tuple[str, str, str], sizes: tuple[int, int, int]) -> dict[str, int]:
    """The two sides of a program's tile and its depth, by name: in the interpreter what there is, since few programs are fast there."""
    most = (512, 512, 512) if INTERPRETED else (64, 64, 16) if exact else (64, 128, 32)
    return {name: min(limit, max(16, triton.next_power_of_2(size))) for name, limit, size in zip(names, most, sizes, strict=True)}


def _factors(tensor: Tensor) -> Tensor:
    """The tensor as kernels take it; the interpreter would multiply the bits of bfloat16, so it converts them itself."""
    return raw(tensor) if INTERPRETED else tensor


def _check_reach(op: str, name: str, tensor: Tensor) -> None:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if last > MOST_ENTRIES:
        raise ValueError(f"{op}: {name}: expected at most {MOST_ENTRIES} entries in a sample or a weight, got {last + 1}")


class _Call:
    """What the three kernels share: windows, sizes and constants of one call. x is [N, C, H, W] in any strides."""

    def __init__(self, op: str, x: Tensor, weight: Tensor, window: Window, out_window: OutWindow, geometry: Geometry) -> None:
        assert_values(op, x.shape[1], window)
        assert_values(op, len(weight), out_window, ("out_start", "out_width"))
        _check_reach(op, "x", x[:1])
        _check_reach(op, "weight", weight)
        self.op, self.x, self.weight, self.geometry = op, x, weight.contiguous(), geometry
        dtype = accumulation_dtype(x)
        self.exact = INTERPRETED or x.dtype == dtype
        start, width, widths = window
        out_start, out_width, out_widths = out_window
        # A missing tensor is never read; any other stands in its place.
        windows = [start, start if widths is None else widths, start if out_start is None else out_start]
        windows.append(windows[2] if out_widths is None else out_widths)
        self.windows = [one.contiguous() for one in windows]
        self.widths = width, out_width
        self.steps = [min(one.dim(), 1) for one in self.windows]
        self.constants: dict[str, Any] = {
            "TAPS": geometry.taps,
            "ACROSS": geometry.kernel[1],
            "WIDTHS": widths is not None,
            "OUT": out_start is not None,
            "OUT_WIDTHS": out_widths is not None,
            "EXACT": self.exact,
            "WIDE": dtype == torch.float64,
        }

    @property
    def steps_of_taps(self) -> tuple[int, ...]:
        """Stride, padding and dilation."""
        return (*self.geometry.stride, *self.geometry.padding, *self.geometry.dilation)

    def forward(self, bias: Tensor | None, y: Tensor) -> None:
        """Write y [N, O, H', W'], whose positions are one stride apart."""
        _check_reach(self.op, "the output", y[:1])
        positions, (_, across) = self.geometry.outputs, self.geometry.out
        blocks = _blocks(self.exact, ("BLOCK_O", "BLOCK_P", "BLOCK_K"), (y.shape[1], positions, self.weight[0].numel()))
        tiles = triton.cdiv(positions, blocks["BLOCK_P"])
        given = (_factors(self.x), _factors(self.weight), raw(self.weight if bias is None else bias.contiguous()), raw(y), *self.windows)
        sizes = (self.x.shape[1], y.shape[1], positions, across, *self.x.shape[2:])
        grid = (len(self.x) * tiles, triton.cdiv(y.shape[1], blocks["BLOCK_O"]))
        numbers = (*self.widths, *self.steps, *sizes, *self.x.stride(), *y.stride()[:2], y.stride(3), *self.steps_of_taps, tiles)
        launch(window_forward_kernel, grid, *given, *numbers, BIAS=bias is not None, **self.constants, **blocks)

    def for_x(self, gradient: Tensor, made: Tensor) -> None:
        """Write the gradient of x to ``made`` [N, C, H, W], whose positions are one stride apart."""
        channels, down, across = self.x.shape[1:]
        blocks = _blocks(self.exact, ("BLOCK_C", "BLOCK_P", "BLOCK_K"), (channels, down * across, len(self.weight)))
        tiles = triton.cdiv(down * across, blocks["BLOCK_P"])
        given = (_factors(gradient), _factors(self.weight), raw(made), *self.windows)
        sizes = (channels, len(self.weight), down * across, across, *self.geometry.out)
        grid = (len(self.x) * tiles, triton.cdiv(channels, blocks["BLOCK_C"]))
        numbers = (*self.widths, *self.steps, *sizes, *gradient.stride(), *made.stride()[:2], made.stride(3), *self.steps_of_taps, tiles)
        launch(window_input_kernel, grid, *given, *numbers, **self.constants, **blocks)

    def for_weight(self, gradient: Tensor, made: Tensor) -> None:
        """Write the gradient of the weight to ``made``; the gradient's positions are one stride apart."""
        outputs, entries = len(self.weight), self.weight[0].numel()
        blocks = _blocks(self.exact, ("BLOCK_O", "BLOCK_C", "BLOCK_K"), (outputs, entries, self.geometry.outputs))
        given = (_factors(gradient), _factors(self.x), raw(made), *self.windows)
        sizes = (len(self.x), self.x.shape[1], outputs, self.geometry.outputs, self.geometry.out[1], *self.x.shape[2:])
        grid = (triton.cdiv(outputs, blocks["BLOCK_O"]), triton.cdiv(entries, blocks["BLOCK_C"]))
        strides = (*gradient.stride()[:2], gradient.stride(3), *self.x.stride())
        numbers = (*self.widths, *self.steps, *sizes, *strides, *self.steps_of_taps)
        launch(window_weight_kernel, grid, *given, *numbers, **self.constants, **blocks)


def _by_position(values: Tensor) -> Tensor:
    """The tensor [N, C, H, W] with positions one stride apart: a copy where they are not."""
    across = values.shape[3]
    apart = values.shape[2] > 1 and values.stride(2) != across * values.stride(3)
    return values.contiguous() if apart else values


def _gradients(
    call: _Call, gradient: Tensor, for_x: Tensor | None, for_weight: Tensor | None, out_window: OutWindow, for_bias: bool
) -> list[Tensor]:
    """Write the gradients of x and the weight where there is something to write to; that of the bias, if it is wanted."""
    gradient = _by_position(gradient)
    _check_reach(call.op, "gradient", gradient[:1])
    if for_x is not None:
        call.for_x(gradient, for_x)
    if for_weight is not None:
        call.for_weight(gradient, for_weight)
    if not for_bias:
        return []
    each = gradient.sum((2, 3), dtype=accumulation_dtype(gradient))
    each = each.masked_fill(~out_mask(len(each), each.shape[1], *out_window, gradient), 0)
    return [each.sum(0).to(gradient.dtype)]


def _targets(x: Tensor, weight: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
    """Memory for the gradients of x and the weight, of each that is needed."""
    return [
        torch.empty(one.shape, dtype=one.dtype, device=one.device) if wanted else None
        for one, wanted in zip((x, weight), needed[:2], strict=True)
    ]


def _as_image(rows: Tensor) -> Tensor:
    """Rows [N, P, C] as an image [N, C, 1, P] of the same memory."""
    return rows.transpose(1, 2).unsqueeze(2)


def window_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: Tensor,
    width: int,
    widths: Tensor | None,
    out_start: Tensor | None,
    out_width: int,
    out_widths: Tensor | None,
) -> Tensor:
    """Launch :func:`taskloom.window_linear`."""
    image, kernel = _as_image(x), weight[:, :, None, None]
    geometry = geometry_of(image, kernel, (1, 1), (0, 0), (1, 1))
    call = _Call("window_linear", image, kernel, (start, width, widths), (out_start, out_width, out_widths), geometry)
    y = torch.empty((x.shape[0], x.shape[1], len(weight)), dtype=x.dtype, device=x.device)
    call.forward(bias, _as_image(y))
    return y


def window_linear_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    start: Tensor,
    width: int,
    widths: Tensor | None,
    out_start: Tensor | None,
    out_width: int,
    out_widths: Tensor | None,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Launch the gradients of :func:`taskloom.window_linear`."""
    image, kernel = _as_image(x), weight[:, :, None, None]
    geometry = geometry_of(image, kernel, (1, 1), (0, 0), (1, 1))
    out_window = (out_start, out_width, out_widths)
    call = _Call("window_linear", image, kernel, (start, width, widths), out_window, geometry)
    for_x, for_weight = _targets(x, weight, needed)
    bias = _gradients(call, _as_image(gradient), None if for_x is None else _as_image(for_x), for_weight, out_window, needed[2])
    return [*(one for one in (for_x, for_weight) if one is not None), *bias]


def window_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: Tensor,
    width: int,
    widths: Tensor | None,
    out_start: Tensor | None,
    out_width: int,
    out_widths: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Launch :func:`taskloom.window_conv2d`."""
    geometry = geometry_of(x, weight, stride, padding, dilation)
    call = _Call("window_conv2d", x, weight, (start, width, widths), (out_start, out_width, out_widths), geometry)
    y = torch.empty((len(x), len(weight), *geometry.out), dtype=x.dtype, device=x.device)
    call.forward(bias, y)
    return y


def window_conv2d_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    start: Tensor,
    width: int,
    widths: Tensor | None,
    out_start: Tensor | None,
    out_width: int,
    out_widths: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    needed: Sequence[bool],
) -> list[Tensor]:
    """Launch the gradients of :func:`taskloom.window_conv2d`."""
    geometry = geometry_of(x, weight, stride, padding, dilation)
    out_window = (out_start, out_width, out_widths)
    call = _Call("window_conv2d", x, weight, (start, width, widths), out_window, geometry)
    for_x, for_weight = _targets(x, weight, needed)
    bias = _gradients(call, gradient, for_x, for_weight, out_window, needed[2])
    return [*(one for one in (for_x, for_weight) if one is not None), *bias]

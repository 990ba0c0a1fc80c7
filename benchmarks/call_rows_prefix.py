"""What one call of each op on prefixes of channels costs on tensors of a few entries, beside torch's own layers of the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

import taskloom
from taskloom.ops.routed import (
    prefix_conv2d_backward,
    prefix_linear_backward,
    prefix_norm_backward,
    ragged_prefix_conv2d_backward,
)

# Kernels on a CPU are Python around torch's own, held against one or two of these.
LIMIT = 6.0

Call = Callable[[], Any]


def calls() -> list[tuple[str, Call, Call, str, Call | None]]:
    ops = torch.ops.taskloom
    rows, layer, gradient = torch.randn(3, 4), torch.randn(6, 8), torch.randn(3, 2)
    x, weight, back = torch.randn(2, 4, 5, 5), torch.randn(6, 8, 3, 3), torch.randn(2, 2, 3, 3)
    steps, ones, wanted = ((1, 1), (0, 0), (1, 1)), torch.ones(8), [True, True, False]
    widths, ragged_back = torch.tensor([4, 2]), torch.randn(2, 6, 3, 3)
    var, mean = torch.var_mean(x.flatten(1), 1, correction=0, keepdim=True)
    aten = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False])

    def torch_backward() -> Any:
        return torch.ops.aten.convolution_backward(back, x, weight[:2, :4], None, *aten)

    return [
        (
            "prefix_linear",
            lambda: taskloom.prefix_linear(rows, layer, None, 2),
            lambda: functional.linear(rows, layer[:2, :4]),
            "linear of a slice",
            lambda: ops.prefix_linear.default(rows, layer, None, 2),
        ),
        (
            "prefix_linear_backward",
            lambda: prefix_linear_backward(gradient, rows, layer),
            lambda: (gradient @ layer[:2, :4], gradient.T @ rows, torch.zeros_like(layer)),
            "two products and zeros",
            lambda: ops.prefix_linear_backward.default(gradient, rows, layer, None, wanted),
        ),
        (
            "prefix_conv2d",
            lambda: taskloom.prefix_conv2d(x, weight, None, 2),
            lambda: functional.conv2d(x, weight[:2, :4]),
            "conv2d of a slice",
            lambda: ops.prefix_conv2d.default(x, weight, None, 2, *steps, 1),
        ),
        (
            "prefix_conv2d_backward",
            lambda: prefix_conv2d_backward(back, x, weight),
            torch_backward,
            "conv2d's of a slice",
            lambda: ops.prefix_conv2d_backward.default(back, x, weight, None, *steps, 1, wanted),
        ),
        (
            "ragged_prefix_conv2d",
            lambda: taskloom.ragged_prefix_conv2d(x, weight, in_channels=widths, out_channels=widths),
            lambda: [functional.conv2d(x[:1], weight[:4, :4]), functional.conv2d(x[1:, :2], weight[:2, :2])],
            "conv2d of each sample",
            lambda: ops.ragged_prefix_conv2d.default(x, weight, None, widths, widths, *steps, True),
        ),
        (
            "ragged_prefix_conv2d_backward",
            lambda: ragged_prefix_conv2d_backward(ragged_back, x, weight, in_channels=widths, out_channels=widths),
            lambda: [torch_backward(), torch_backward()],
            "conv2d's of each sample",
            lambda: ops.ragged_prefix_conv2d_backward.default(ragged_back, x, weight, None, widths, widths, *steps, wanted),
        ),
        (
            "prefix_norm",
            lambda: taskloom.prefix_norm(x, ones, ones),
            lambda: functional.group_norm(x, 1, ones[:4], ones[:4]),
            "group_norm of slices",
            lambda: ops.prefix_norm.default(x, ones, ones, "layer", 1, None, None, 1e-5, False)[0],
        ),
        (
            "prefix_norm_backward",
            lambda: prefix_norm_backward(x, x, ones, ones, mean, var),
            lambda: torch.ops.aten.native_group_norm_backward(x, x, mean, var, ones[:4], 2, 4, 25, 1, [True, True, True]),
            "group_norm's of slices",
            lambda: ops.prefix_norm_backward.default(x, x, ones, ones, mean, var, "layer", False, 1e-5, False, [True] * 3),
        ),
    ]

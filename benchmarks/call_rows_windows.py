"""What one call of each op on windows of channels costs on tensors of a few entries, beside torch's own layer of a masked input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

import taskloom
from taskloom.ops.routed import window_conv2d_backward, window_linear_backward

# A call reads the windows and sorts the samples by them before it multiplies: it is held against a mask and a layer.
LIMIT = 10.0

Call = Callable[[], Any]
Calls = list[tuple[str, Call, Call, str, Call | None]]


def calls() -> Calls:
    """Op, ours, peer, the peer's name and the native op alone, of windows."""
    ops = torch.ops.taskloom
    x, weight, image, kernel = torch.randn(2, 1, 4), torch.randn(3, 4), torch.randn(2, 4, 3, 3), torch.randn(3, 4, 2, 2)
    start, mask = torch.tensor([1, 0]), torch.tensor([[0.0, 1, 1, 0], [1, 1, 0, 0]])
    images, rows = mask[:, :, None, None], mask[:, None]
    gradient, back, triple, plain = torch.randn(2, 1, 3), torch.randn(2, 3, 2, 2), [True, True, True], ([1, 1], [0, 0], [1, 1])
    windows = (start, 2, None, None, 0, None)
    return [
        (
            "window_linear",
            lambda: taskloom.window_linear(x, weight, start=start, width=2),
            lambda: functional.linear(x * rows, weight),
            "a mask and linear",
            lambda: ops.window_linear.default(x, weight, None, *windows),
        ),
        (
            "window_linear_backward",
            lambda: window_linear_backward(gradient, x, weight, start, 2),
            lambda: ((gradient @ weight) * rows, gradient.view(2, 3).T @ (x * rows).view(2, 4), gradient.sum((0, 1))),
            "masks and products",
            lambda: ops.window_linear_backward.default(gradient, x, weight, *windows, triple),
        ),
        (
            "window_conv2d",
            lambda: taskloom.window_conv2d(image, kernel, start=start, width=2),
            lambda: functional.conv2d(image * images, kernel),
            "a mask and conv2d",
            lambda: ops.window_conv2d.default(image, kernel, None, *windows, *plain),
        ),
        (
            "window_conv2d_backward",
            lambda: window_conv2d_backward(back, image, kernel, start, 2),
            lambda: torch.ops.aten.convolution_backward(back, image * images, kernel, [3], *plain, False, (0, 0), 1, triple),
            "a mask and convolution_backward",
            lambda: ops.window_conv2d_backward.default(back, image, kernel, *windows, *plain, triple),
        ),
    ]

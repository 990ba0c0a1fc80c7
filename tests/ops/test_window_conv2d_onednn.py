"""window_conv2d by oneDNN's convolutions of views: when the op takes them, rounding, what lies outside of windows, order of sums."""

from __future__ import annotations

import pytest
import torch
from contract import assert_close, assert_same_bits
from samples import weights
from torch import Tensor

import taskloom
from taskloom.ops.routed import _conv_onednn, window_conv2d_backward
from taskloom.ops.routed._conv_products import geometry_of
from taskloom.ops.routed._products import onednn_dtypes, product_dtype
from taskloom.ops.routed._windows import groups
from taskloom.reference import routed as reference

BF16, PLAIN = torch.bfloat16, ((1, 1), (1, 1), (1, 1))
START, WIDTH = torch.tensor([3, 40, 40, 17]), 50
multiplies_bfloat16 = pytest.mark.skipif(
    BF16 not in onednn_dtypes() or product_dtype(BF16) != BF16, reason="the processor has no products of bfloat16"
)
pytestmark = pytest.mark.skipif(torch.float32 not in onednn_dtypes(), reason="this torch has no oneDNN")


def given(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output's gradient, x, weight and bias; x is NaN outside of the windows."""
    x, mask = weights(4, 96, 24, 24, dtype=dtype), torch.arange(96)
    inside = (mask >= START[:, None]) & (mask < START[:, None] + WIDTH)
    x = torch.where(inside[:, :, None, None], x, torch.nan)
    return weights(4, 64, 24, 24, seed=3, dtype=dtype), x, weights(64, 96, 3, 3, seed=1, dtype=dtype), weights(64, seed=2, dtype=dtype)


def share_apart(got: Tensor, exact: Tensor) -> float:
    """The share of entries that are not the exact ones, rounded once."""
    return float((got != exact.to(got.dtype)).double().mean())


def path(x: Tensor, weight: Tensor, start: Tensor | int, **named: Tensor | int) -> str:
    return str(taskloom.explain("window_conv2d", x, weight, start=start, padding=1, **{"width": WIDTH, **named}).path)


@multiplies_bfloat16
def test_bfloat16_is_rounded_once() -> None:
    gradient, x, weight, bias = given(BF16)
    assert path(x, weight, START).startswith("oneDNN's convolutions of windows")
    exact = reference.window_conv2d(x.double(), weight.double(), bias.double(), START, WIDTH, None, None, 0, None, *PLAIN)
    y = taskloom.window_conv2d(x, weight, bias, start=START, width=WIDTH, padding=1)
    assert share_apart(y, exact) < 0.01
    back = reference.window_conv2d_backward(
        gradient.double(), x.double(), weight.double(), START, WIDTH, None, None, 0, None, *PLAIN, (True,) * 3
    )
    found = window_conv2d_backward(gradient, x, weight, START, WIDTH, None, None, 0, None, *PLAIN)
    assert share_apart(found[0], back[0]) < 0.01
    # Shares of runs are rounded, and their sum in float32.
    for ours, theirs in zip(found[1:], back[1:], strict=True):
        error, rounding = ((one.double() - theirs).norm() for one in (ours, theirs.to(BF16)))
        assert error <= 2 * rounding
    assert not found[1][:, :3].any()
    assert not found[1][:, 90:].any()
    for first, second in zip(found, window_conv2d_backward(gradient, x, weight, START, WIDTH, None, None, 0, None, *PLAIN), strict=True):
        assert_same_bits(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(BF16, marks=multiplies_bfloat16)])
def test_one_window_and_windows_of_outputs(dtype: torch.dtype) -> None:
    gradient, x, weight, bias = given(dtype)
    x = x.nan_to_num(0.5)
    for named in ({"start": 7}, {"start": torch.full((4,), 7), "out_start": 5, "out_width": 33}):
        assert path(x, weight, **named).startswith("oneDNN's convolutions of windows: 52%")
        results = []
        for backend in ("native", "reference"):
            leaves = [one.clone().requires_grad_() for one in (x, weight, bias)]
            with taskloom.backend(backend):
                y = taskloom.window_conv2d(*leaves, width=WIDTH, padding=1, **named)
                results.append([y.detach(), *torch.autograd.grad(y, leaves, gradient)])
        for ours, theirs in zip(*results, strict=True):
            assert ours.stride() == theirs.stride()
            assert_close(ours, theirs, 2e-6)


def test_where_float32_goes_another_way() -> None:
    _, x, weight, _ = given(torch.float32)
    assert not path(x, weight, START).startswith("oneDNN")
    assert not path(x, weight, torch.tensor([7, 7, 7, 8])).startswith("oneDNN")
    assert path(x, weight, torch.tensor([7, 7, 7, 7])).startswith("oneDNN")


@multiplies_bfloat16
def test_many_windows_of_small_images_are_masked() -> None:
    x, weight = weights(8, 96, 3, 4, dtype=BF16), weights(48, 96, 3, 3, seed=1, dtype=BF16)
    start = torch.arange(8)
    shown = path(x, weight, start)
    assert shown.startswith("torch's convolution of masked samples: 52% of the channels are seen; convolutions of windows would cost ")
    assert path(x, weight, 5).startswith("oneDNN's convolutions of windows")
    assert path(x, weight, start, out_start=3, out_width=12).startswith("oneDNN's convolutions of windows")
    gradient, arguments = weights(8, 48, 3, 4, seed=3, dtype=BF16), (start, WIDTH, None, None, 0, None, *PLAIN)
    found = window_conv2d_backward(gradient, x, weight, *arguments)
    with taskloom.backend("reference"):
        for ours, theirs in zip(found, window_conv2d_backward(gradient, x, weight, *arguments), strict=True):
            assert_close(ours, theirs)


def test_costs_count_runs() -> None:
    x, weight = weights(4, 10, 6, 6), weights(5, 10, 3, 3)
    geometry = geometry_of(x, weight, *PLAIN)
    planned = groups("window_conv2d", 4, 10, (torch.tensor([2, 1, 2, 2]), 4, None), 5, (None, 0, None))
    own, dense = _conv_onednn.window_costs(planned, x, 5, geometry, backward=False)
    call, beside = _conv_onednn.PRODUCTS_OF_CALL, _conv_onednn.PIXELS_OF_WEIGHT
    assert own == 3 * call + 9 * 4 * 5 * (4 * 36 + 3 * beside)
    assert dense == call + 9 * 10 * 5 * (4 * 36 + beside)

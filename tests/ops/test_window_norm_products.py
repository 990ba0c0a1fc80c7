"""window_norm_linear and window_norm_conv2d: exactly the product of the masked norm, with all gradients; errors; compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled import compiled
from contract import assert_close, assert_same_bits
from samples import weights
from test_window_norms import mask_of
from torch import Tensor

import taskloom
from taskloom import reference
from taskloom.ops.routed._products import product_dtype

F64 = torch.float64
STARTS = torch.tensor([0, 5, 17, 9])
WINDOWS = [(STARTS, 7), (STARTS, torch.tensor([20, 1, 7, 12])), (3, 20), (torch.tensor(0), 24)]
windows = pytest.mark.parametrize(("start", "width"), WINDOWS, ids=["width 7", "widths", "one window", "all channels"])


def linear_inputs(dtype: torch.dtype = F64) -> list[Tensor]:
    """x, weight, bias, shift, scale."""
    shapes = ((4, 6, 24), (10, 24), (10,), (4, 24), (4, 24))
    return [weights(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate(shapes)]


def conv_inputs(dtype: torch.dtype = F64, kernel: tuple[int, int] = (3, 3)) -> list[Tensor]:
    """x, the norm's weight and bias, weight, bias."""
    shapes = ((4, 24, 7, 6), (24,), (24,), (5, 24, *kernel), (5,))
    return [weights(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate(shapes)]


def eager_linear(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, start: Any, width: Any) -> Tensor:
    masked = mask_of(torch.as_tensor(start).expand(len(x)), width, x.shape[2])[:, None].to(x.dtype) * x
    return F.linear(F.layer_norm(masked, x.shape[2:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None], weight, bias)


def eager_conv(inputs: list[Tensor], start: Any, width: Any, **options: Any) -> Tensor:
    x, norm_weight, norm_bias, weight, bias = inputs
    masked = mask_of(torch.as_tensor(start).expand(len(x)), width, x.shape[1])[..., None, None].to(x.dtype) * x
    return F.conv2d(F.silu(F.group_norm(masked, 4, norm_weight, norm_bias, eps=1e-5)), weight, bias, **options)


def assert_equal_with_gradients(y: Tensor, expected: Tensor, inputs: list[Tensor], tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    slope = weights(*y.shape, seed=9, dtype=y.dtype)
    for ours, theirs in zip(torch.autograd.grad(y, inputs, slope), torch.autograd.grad(expected, inputs, slope), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@windows
def test_linear_is_that_of_the_masked_norm(start: Any, width: Any) -> None:
    given = linear_inputs()
    y = taskloom.window_norm_linear(*given, start=start, width=width)
    assert_equal_with_gradients(y, eager_linear(*given, start, width), given)


@windows
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((3, 3), {"padding": 1}),
        ((3, 3), {"padding": 2, "stride": 2, "dilation": 2}),
        ((1, 3), {"padding": (0, 2), "stride": (2, 1)}),
        ((1, 1), {}),
    ],
    ids=["3x3", "dilated", "1x3", "1x1"],
)
def test_conv2d_is_that_of_the_masked_norm(start: Any, width: Any, kernel: tuple[int, int], options: dict[str, Any]) -> None:
    given = conv_inputs(kernel=kernel)
    y = taskloom.window_norm_conv2d(*given, groups=4, start=start, width=width, **options)
    assert_equal_with_gradients(y, eager_conv(given, start, width, **options), given)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("width", [3, 20])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_low_precision(backend: str, width: int, dtype: torch.dtype, tolerance: float) -> None:
    def relative(got: Tensor, exact: Tensor) -> float:
        return float((got.double() - exact).norm() / exact.norm())

    start = torch.tensor([0, 1, 4, 2])
    with taskloom.backend(backend), torch.no_grad():
        given = linear_inputs(dtype)
        y = taskloom.window_norm_linear(*given, start=start, width=width)
        exact = reference.routed.window_norm_linear(*(one.double() for one in given), start, width, None, 1e-6)
        assert y.dtype == dtype
        assert relative(y, exact) <= tolerance
        given = conv_inputs(dtype)
        y = taskloom.window_norm_conv2d(*given, groups=4, start=start, width=width, padding=1)
        exact = reference.routed.window_norm_conv2d(*(one.double() for one in given), 4, start, width, None, (1, 1), (1, 1), (1, 1), 1e-5)
        assert y.dtype == dtype
        assert relative(y, exact) <= tolerance


def test_optional_arguments() -> None:
    x, weight, bias, shift, scale = linear_inputs()
    zeros = torch.zeros_like(shift)
    for given, full in (
        ((x, weight), (x, weight, torch.zeros_like(bias), zeros, zeros)),
        ((x, weight, bias, shift), (x, weight, bias, shift, zeros)),
        ((x, weight, None, None, scale), (x, weight, torch.zeros_like(bias), zeros, scale)),
    ):
        y = taskloom.window_norm_linear(*given, start=STARTS, width=7)
        torch.testing.assert_close(y, eager_linear(*full, STARTS, 7), rtol=1e-10, atol=1e-10)
    assert taskloom.window_norm_linear(x[:, 0], weight, start=STARTS, width=7).shape == (4, 10)
    maps, norm_weight, norm_bias, weight, bias = conv_inputs()
    y = taskloom.window_norm_conv2d(maps, None, norm_bias, weight, groups=4, start=STARTS, width=7)
    full = [maps, torch.ones_like(norm_weight), norm_bias, weight, torch.zeros_like(bias)]
    torch.testing.assert_close(y, eager_conv(full, STARTS, 7), rtol=1e-10, atol=1e-10)


def test_empty_batches() -> None:
    _, weight, bias, shift, scale = linear_inputs(torch.float32)
    none = torch.zeros(0, dtype=torch.int64)
    assert taskloom.window_norm_linear(torch.zeros(0, 6, 24), weight, bias, shift[:0], scale[:0], start=none, width=7).shape == (0, 6, 10)
    assert taskloom.window_norm_linear(torch.zeros(4, 0, 24), weight, bias, shift, scale, start=STARTS, width=7).shape == (4, 0, 10)
    _, *others = conv_inputs(torch.float32)
    y = taskloom.window_norm_conv2d(torch.zeros(0, 24, 7, 6), *others, groups=4, start=none, width=7, padding=1)
    assert y.shape == (0, 5, 7, 6)


def test_channels_outside_are_not_read() -> None:
    mask = mask_of(STARTS, 7, 24).bool()
    x, *others = linear_inputs(torch.float32)
    poisoned = torch.where(mask[:, None], x, torch.nan).detach().requires_grad_()
    y = taskloom.window_norm_linear(poisoned, *others, start=STARTS, width=7)
    assert_same_bits(y, taskloom.window_norm_linear(x, *others, start=STARTS, width=7))
    gradients = torch.autograd.grad(y.square().sum(), [poisoned, *others])
    assert all(bool(one.isfinite().all()) for one in gradients)
    assert not gradients[0][~mask[:, None].expand(x.shape)].any()
    # The constants of the channels outside depend on every column of the weight.
    assert bool((gradients[1] != 0).all())
    maps, *others = conv_inputs(torch.float32)
    inside = mask[..., None, None].expand(maps.shape)
    poisoned = torch.where(inside, maps, torch.nan).detach().requires_grad_()
    y = taskloom.window_norm_conv2d(poisoned, *others, groups=4, start=STARTS, width=7, padding=1)
    gradients = torch.autograd.grad(y.square().sum(), [poisoned, *others])
    assert all(bool(one.isfinite().all()) for one in gradients)
    assert not gradients[0][~inside].any()


def test_second_derivatives_of_the_reference() -> None:
    given = [one[:, :2].detach().requires_grad_() if one.dim() == 3 else one for one in linear_inputs()]

    def product(*inputs: Tensor) -> Tensor:
        return taskloom.window_norm_linear(*inputs, start=STARTS, width=7)

    with taskloom.backend("reference"):
        assert torch.autograd.gradgradcheck(product, given, fast_mode=True)


def test_compiled(fresh_compiler: None) -> None:
    given, maps = linear_inputs(torch.float32), conv_inputs(torch.float32)

    def linear_loss(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, scale: Tensor, start: Tensor) -> Tensor:
        return taskloom.window_norm_linear(x, weight, bias, shift, scale, start=start, width=7).square().sum()

    def conv_loss(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, start: Tensor) -> Tensor:
        y = taskloom.window_norm_conv2d(x, norm_weight, norm_bias, weight, bias, groups=4, start=start, width=7, padding=1)
        return y.square().sum()

    for loss, inputs in ((linear_loss, given), (conv_loss, maps)):
        run: Callable[..., Tensor] = compiled(loss)
        ours, theirs = (torch.autograd.grad(one(*inputs, STARTS), inputs) for one in (run, loss))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


X, WEIGHT, MAPS, FILTERS = torch.zeros(4, 5, 24), torch.zeros(10, 24), torch.zeros(4, 24, 7, 6), torch.zeros(5, 24, 3, 3)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": X.long()}, TypeError, "x: expected float32"),
        ({"weight": WEIGHT.T}, ValueError, r"weight: expected shape \(out, 24\)"),
        ({"weight": WEIGHT.half()}, TypeError, "weight: expected torch.float32, got torch.float16"),
        ({"bias": torch.zeros(9)}, ValueError, r"bias: expected shape \(10,\) as weight says, got \(9,\)"),
        ({"shift": torch.zeros(24)}, ValueError, r"shift: expected shape \(4, 24\) as x's samples and channels, got \(24,\)"),
        ({"width": 8}, ValueError, "start: expected windows within 24 channels, got 17 to 24 for sample 2"),
    ],
)
def test_linear_errors(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"window_norm_linear: {message}"):
        taskloom.window_norm_linear(**{"x": X, "weight": WEIGHT, "start": STARTS, "width": 7} | changed)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": MAPS[0]}, ValueError, r"x: expected shape \[N, C, H, W\], got \(24, 7, 6\)"),
        ({"weight": FILTERS[:, 1:]}, ValueError, r"weight: expected shape \(out, 24, kh, kw\)"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \(5,\) as weight says, got \(4,\)"),
        ({"groups": 7}, ValueError, "groups: expected a divisor of 24, the channels of x, got 7"),
        ({"stride": 0}, ValueError, "stride: expected at least 1, got 0"),
        ({"padding": (1, 1, 1)}, ValueError, r"padding: expected one number or two, got \(1, 1, 1\)"),
        ({"dilation": 1.5}, TypeError, "dilation: expected an integer, got float"),
        ({"norm_weight": torch.zeros(4)}, ValueError, r"norm_weight: expected shape \(24,\) as x's channels, got \(4,\)"),
        (
            {"start": STARTS + 1},
            ValueError,
            "start: expected windows within 24 channels, got 18 to 24 for sample 2",
        ),
    ],
)
def test_conv2d_errors(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"x": MAPS, "norm_weight": None, "norm_bias": None, "weight": FILTERS, "groups": 4, "start": STARTS, "width": 7}
    with pytest.raises(error, match=f"window_norm_conv2d: {message}"):
        taskloom.window_norm_conv2d(**given | changed)


def test_ways_are_explained_and_agree() -> None:
    named: dict[str, Any] = {"groups": 4, "start": torch.tensor([0, 1, 4, 2]), "padding": 1}
    weight, norm_weight = weights(17, 24, 3, 3, seed=1), weights(24, seed=2)
    for side, narrow, wide in ((12, 7, 20), (5, 4, 17)):
        maps = weights(4, 24, side, side)
        shown = taskloom.explain("window_norm_conv2d", maps, norm_weight, None, weight, width=narrow, **named)
        assert shown.chosen == "native"
        assert str(shown.path).startswith("constants of the channels outside, and ")
        dense = str(taskloom.explain("window_norm_conv2d", maps, norm_weight, None, weight, width=wide, **named).path)
        assert dense.startswith(f"torch's convolution of all channels: {wide / 24:.0%} of them are seen, from ")
        for width in (narrow, wide):
            y = taskloom.window_norm_conv2d(maps, norm_weight, None, weight, width=width, **named)
            with taskloom.backend("reference"):
                assert_close(y, taskloom.window_norm_conv2d(maps, norm_weight, None, weight, width=width, **named), 2e-6)
    pointwise = taskloom.explain("window_norm_conv2d", maps, None, None, weight[:, :, :1, :1], groups=4, start=0, width=24).path
    assert str(pointwise).startswith("constants")


def test_ways_of_the_linear_are_explained() -> None:
    given = [one.detach() for one in linear_inputs(torch.bfloat16)]
    paths = [str(taskloom.explain("window_norm_linear", *given, start=0, width=width).path) for width in (7, 24)]
    assert paths[0] == "constants of the channels outside, and products of windows: 1 window among 4 samples of 6 rows"
    if product_dtype(torch.bfloat16) == torch.bfloat16:
        assert paths[1] == "torch's product of all channels: 100% of them are seen, from 70% on"
    widths = torch.tensor([24, 20, 20, 24])
    named: dict[str, Any] = {"start": torch.zeros(4, dtype=torch.int64), "width": widths}
    assert str(taskloom.explain("window_norm_linear", *(one.float() for one in given), **named).path).startswith("constants")
    with pytest.raises(ValueError, match="did you mean 'window_norm_linear'"):
        taskloom.explain("window_norm_lineer")

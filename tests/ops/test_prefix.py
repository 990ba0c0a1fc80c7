"""Ops on prefixes of channels beyond their contracts: what a prefix is, what lies outside of it, derivatives, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases_prefix import widths
from compiled import compiled
from contract import assert_same_bits
from samples import weights
from torch import Tensor
from torch.nn import functional

import taskloom

F64 = torch.float64
KERNELS = [(3, {"padding": 1}), (1, {}), (3, {"stride": 2, "padding": 2, "dilation": 2})]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_is_the_dense_layer_with_a_mask(backend: str) -> None:
    x, weight, bias = weights(3, 10, 7, 6, dtype=F64), weights(12, 10, 3, 3, seed=1, dtype=F64), weights(12, seed=2, dtype=F64)
    masked = x * (torch.arange(10) < 4)[:, None, None]
    with taskloom.backend(backend):
        y = taskloom.prefix_conv2d(x[:, :4], weight, bias, 7, padding=1)
        torch.testing.assert_close(y, functional.conv2d(masked, weight, bias, padding=1)[:, :7], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(y, functional.conv2d(x[:, :4], weight[:7, :4], bias[:7], padding=1), rtol=1e-12, atol=1e-12)
        rows = taskloom.prefix_linear(x[..., 0, 0][:, :4], weight[..., 0, 0], bias, 7)
        torch.testing.assert_close(rows, functional.linear(masked[..., 0, 0], weight[..., 0, 0], bias)[:, :7], rtol=1e-12, atol=1e-12)
        whole = taskloom.prefix_conv2d(x, weight, bias, padding=1)
        torch.testing.assert_close(whole, functional.conv2d(x, weight, bias, padding=1), rtol=1e-12, atol=1e-12)


def _changed(tensor: Tensor, *prefix: int) -> Tensor:
    """NaN outside a prefix."""
    fresh = torch.full_like(tensor, torch.nan)
    inside = tuple(slice(size) for size in prefix)
    fresh[inside] = tensor[inside]
    return fresh


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("kernel", "steps"), KERNELS)
def test_nothing_outside_the_prefix_changes_a_bit(kernel: int, steps: dict[str, Any], dtype: torch.dtype) -> None:
    x = weights(2, 5, 8, 9, dtype=dtype)
    weight, bias = weights(12, 10, kernel, kernel, seed=1, dtype=dtype), weights(12, seed=2, dtype=dtype)
    gradients = []
    for w, b in ((weight, bias), (_changed(weight, 7, 5), _changed(bias, 7))):
        leaves = [one.clone().requires_grad_() for one in (x, w, b)]
        y = taskloom.prefix_conv2d(*leaves, 7, **steps)
        gradients.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for first, second in zip(*gradients, strict=True):
        assert_same_bits(first.detach(), second.detach())
    rows = x[:, :, 0, 0]
    plain = taskloom.prefix_linear(rows, weight[..., 0, 0], bias, 7)
    assert_same_bits(plain, taskloom.prefix_linear(rows, _changed(weight, 7, 5)[..., 0, 0], _changed(bias, 7), 7))


@pytest.mark.parametrize(("kernel", "steps"), KERNELS)
def test_gradients_outside_the_prefix_are_zero_and_passes_add(kernel: int, steps: dict[str, Any]) -> None:
    weight, bias = weights(12, 10, kernel, kernel, seed=1).requires_grad_(), weights(12, seed=2).requires_grad_()

    def step(inputs: int, outputs: int) -> tuple[Tensor, ...]:
        y = taskloom.prefix_conv2d(weights(2, inputs, 8, 9), weight, bias, outputs, **steps)
        return torch.autograd.grad(y.square().sum(), (weight, bias))

    narrow, other = step(5, 7), step(8, 3)
    for (for_weight, for_bias), (inputs, outputs) in ((narrow, (5, 7)), (other, (8, 3))):
        assert for_weight[:outputs, :inputs].ne(0).all()
        outside = for_weight.clone()
        outside[:outputs, :inputs] = 0
        assert not outside.any()
        assert not for_bias[outputs:].any()
    for inputs, outputs in ((5, 7), (8, 3)):
        taskloom.prefix_conv2d(weights(2, inputs, 8, 9), weight, bias, outputs, **steps).square().sum().backward()
    assert weight.grad is not None
    assert_same_bits(weight.grad, narrow[0] + other[0])


MIXED = {"in_channels": widths(5, 10, 2, 5, 10), "out_channels": widths(7, 12, 1, 7, 3)}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("kernel", "steps"), KERNELS)
@pytest.mark.usefixtures("restored_threads")
def test_a_sample_of_a_ragged_batch_is_alone(kernel: int, steps: dict[str, Any], channels_last: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    x, weight, bias = weights(5, 10, 8, 9), weights(12, 10, kernel, kernel, seed=1), weights(12, seed=2)
    for place, inputs in enumerate(MIXED["in_channels"].tolist()):
        x[place, inputs:] = torch.nan
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    y = taskloom.ragged_prefix_conv2d(x, weight, bias, **MIXED, **steps)
    order = torch.tensor([3, 0, 4, 2, 1])
    others = taskloom.ragged_prefix_conv2d(x[order], weight, bias, **{name: one[order] for name, one in MIXED.items()}, **steps)
    assert_same_bits(others, y[order])
    for place, (inputs, outputs) in enumerate(zip(*(one.tolist() for one in MIXED.values()), strict=True)):
        batch = (
            x[place : place + 1, :inputs]
            .expand(3, -1, -1, -1)
            .contiguous(memory_format=torch.channels_last if channels_last and inputs > 1 else torch.contiguous_format)
        )
        assert_same_bits(y[place, :outputs], taskloom.prefix_conv2d(batch, weight, bias, outputs, **steps)[1])
        assert not y[place, outputs:].any()
    kept = taskloom.ragged_prefix_conv2d(x, weight, bias, **MIXED, **steps, zero_tail=False)
    for place, outputs in enumerate(MIXED["out_channels"].tolist()):
        assert_same_bits(kept[place, :outputs], y[place, :outputs])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_gradients_of_a_ragged_batch(backend: str) -> None:
    x, weight, bias = weights(5, 10, 5, 6), weights(12, 10, 3, 3, seed=1).requires_grad_(), weights(12, seed=2).requires_grad_()
    gradient, parts = weights(5, 12, 5, 6, seed=3), []
    for place, (inputs, outputs) in enumerate(zip(*(one.tolist() for one in MIXED.values()), strict=True)):
        own = x[place : place + 1, :inputs].clone().requires_grad_()
        y = taskloom.prefix_conv2d(own, weight, bias, outputs, padding=1)
        parts.append(torch.autograd.grad(y, (own, weight, bias), gradient[place : place + 1, :outputs]))
        x[place, inputs:], gradient[place, outputs:] = torch.nan, torch.nan
    x.requires_grad_()
    with taskloom.backend(backend):
        y = taskloom.ragged_prefix_conv2d(x, weight, bias, **MIXED, padding=1)
        if backend == "native":
            found = torch.autograd.grad(y, (x, weight, bias), gradient)
        else:
            found = torch.autograd.grad(y, (x, weight, bias), gradient.nan_to_num())
    for place, (own, _, _) in enumerate(parts):
        torch.testing.assert_close(found[0][place, : own.shape[1]], own[0], rtol=1e-4, atol=1e-5)
        assert not found[0][place, own.shape[1] :].any()
    for place in (1, 2):
        torch.testing.assert_close(found[place], sum(one[place] for one in parts), rtol=1e-4, atol=1e-4)


def _double(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [weights(*shape, seed=seed, dtype=F64).requires_grad_() for seed, shape in enumerate(shapes)]


NORMS: list[dict[str, Any]] = [{"kind": "batch"}, {"kind": "layer", "relu": True}, {"kind": "group", "groups": 2}]
CALLS: list[tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = [
    (lambda x, w, b: taskloom.prefix_linear(x, w, b, 3), [(3, 2), (4, 3), (4,)]),
    (lambda x, w, b: taskloom.prefix_conv2d(x, w, b, 3, padding=1), [(2, 2, 3, 3), (4, 3, 3, 3), (4,)]),
    (lambda x, w, b: taskloom.prefix_conv2d(x, w, b, 3), [(2, 2, 3, 2), (4, 3, 1, 1), (4,)]),
    (lambda x, w, b: taskloom.prefix_conv2d(x, w, b, groups=4), [(2, 3, 3, 3), (4, 1, 2, 2), (4,)]),
    (
        lambda x, w, b: taskloom.ragged_prefix_conv2d(x, w, b, in_channels=[1, 2], out_channels=[4, 2]),
        [(2, 2, 3, 3), (4, 3, 2, 2), (4,)],
    ),
    *((lambda x, w, b, norm=norm: taskloom.prefix_norm(x, w, b, **norm), [(3, 4, 2), (5,), (5,)]) for norm in NORMS),
]


@pytest.mark.parametrize(("call", "shapes"), CALLS)
def test_gradients(call: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> None:
    with taskloom.backend("native"):
        assert torch.autograd.gradcheck(call, _double(*shapes), fast_mode=True)
    with taskloom.backend("reference"):
        assert torch.autograd.gradgradcheck(call, _double(*shapes), fast_mode=True)


@pytest.mark.parametrize(("call", "shapes"), CALLS)
def test_transforms(call: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> None:
    leaves = _double(*shapes)
    expected = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    plain = tuple(one.detach() for one in leaves)

    def loss(*given: Tensor) -> Tensor:
        return call(*given).square().sum()

    for ours, theirs in zip(torch.func.grad(loss, argnums=(0, 1, 2))(*plain), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    _, tangent = torch.func.jvp(loss, plain, tuple(torch.ones_like(one) for one in plain))
    torch.testing.assert_close(tangent, sum(one.sum() for one in expected))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_for_any_size() -> None:
    def loss(x: Tensor, weight: Tensor, bias: Tensor, last: Tensor) -> Tensor:
        y = taskloom.prefix_conv2d(x, weight, bias, 7, padding=1)
        y = taskloom.prefix_norm(y, kind="group", groups=7, relu=True)
        return taskloom.prefix_linear(y.mean((2, 3)), last, None, 4).square().sum()

    run = compiled(loss)
    for batch, inputs in ((3, 5), (4, 8)):
        given = [weights(batch, inputs, 6, 7), weights(12, 10, 3, 3, seed=1), weights(12, seed=2), weights(6, 9, seed=3)]
        leaves = [one.requires_grad_() for one in given]
        ours, theirs = (torch.autograd.grad(function(*leaves), leaves) for function in (run, loss))
        for first, second in zip(ours, theirs, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_autocast_does_not_round_inside() -> None:
    x, weight = weights(3, 5, 6, 6), weights(12, 10, 1, 1, seed=1)
    plain = taskloom.prefix_conv2d(x, weight, None, 7), taskloom.prefix_linear(x, weight[..., 0, 0].new_ones(4, 6), None, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(taskloom.prefix_conv2d(x, weight, None, 7), plain[0])
        assert_same_bits(taskloom.prefix_linear(x, weight[..., 0, 0].new_ones(4, 6), None, 3), plain[1])


def test_statistics_are_of_the_prefix_only() -> None:
    x = weights(3, 8, 5, 4)
    normal = (x - x.mean((1, 2, 3), keepdim=True)) / (x.var((1, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(taskloom.prefix_norm(x), normal, rtol=1e-5, atol=1e-5)
    weight, bias = weights(11, seed=1), weights(11, seed=2)
    for settings in NORMS:
        plain = taskloom.prefix_norm(x, weight, bias, **settings)
        assert_same_bits(plain, taskloom.prefix_norm(x, _changed(weight, 8), _changed(bias, 8), **settings))
    torch.testing.assert_close(
        taskloom.prefix_norm(x, weight, bias, kind="batch"), functional.batch_norm(x, None, None, weight[:8], bias[:8], training=True)
    )


def test_offsets_do_not_spoil_the_statistics() -> None:
    x = 1000 + weights(4, 6, 9, 9)
    for settings in NORMS:
        exact = taskloom.prefix_norm(x.double(), **settings)
        theirs = functional.batch_norm(x, None, None, training=True) if settings["kind"] == "batch" else None
        if settings["kind"] != "batch":
            theirs = functional.group_norm(x, settings.get("groups", 1))
            theirs = theirs.relu() if settings.get("relu") else theirs
        error, allowed = ((one - exact).norm() / exact.norm() for one in (taskloom.prefix_norm(x, **settings), theirs))
        assert error <= 2 * allowed + 1e-6


X, W, B, IMAGE, C = torch.zeros(3, 5), torch.zeros(6, 8), torch.zeros(6), torch.zeros(2, 5, 4, 4), torch.zeros(6, 8, 3, 3)
D, RAGGED = torch.zeros(8, 1, 3, 3), {"in_channels": [1, 5], "out_channels": [6, 2]}
ERRORS: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ("prefix_linear", (X.long(), W), {}, TypeError, "x: expected float32"),
    ("prefix_linear", (X, W.half()), {}, TypeError, "weight: expected torch.float32 as x, got torch.float16"),
    ("prefix_linear", (X, W, B.double()), {}, TypeError, "bias: expected torch.float32 as x, got torch.float64"),
    ("prefix_linear", (X, W[0]), {}, ValueError, r"weight: expected 2 dimensions, got shape \(8,\)"),
    ("prefix_linear", (X[0, 0], W), {}, ValueError, "x: expected at least one dimension"),
    ("prefix_linear", (torch.zeros(3, 9), W), {}, ValueError, "x: expected 1 to 8 channels, those of weight, got 9"),
    ("prefix_linear", (torch.zeros(3, 0), W), {}, ValueError, "x: expected 1 to 8 channels, those of weight, got 0"),
    ("prefix_linear", (X, W, B[:5]), {}, ValueError, r"bias: expected shape \(6,\) as the rows of weight, got \(5,\)"),
    ("prefix_linear", (X, W, B, 7), {}, ValueError, "out_features: expected 1 to 6, the channels of weight, got 7"),
    ("prefix_linear", (X, W, B, 0), {}, ValueError, "out_features: expected 1 to 6"),
    ("prefix_linear", (X, W, B, 0.5), {}, TypeError, "out_features: expected an integer, got float"),
    ("prefix_linear", (X, W, B, "6"), {}, TypeError, "out_features: expected an integer, got str"),
    ("prefix_conv2d", (X, C), {}, ValueError, r"x: expected shape \(N, C, H, W\), got \(3, 5\)"),
    ("prefix_conv2d", (IMAGE, W), {}, ValueError, "weight: expected 4 dimensions"),
    ("prefix_conv2d", (IMAGE[:, :0], C), {}, ValueError, "x: expected 1 to 8 channels"),
    ("prefix_conv2d", (IMAGE, C, None, 7), {}, ValueError, "out_channels: expected 1 to 6"),
    ("prefix_conv2d", (IMAGE, C), {"stride": 0}, ValueError, "stride: expected at least 1, got 0"),
    ("prefix_conv2d", (IMAGE, C), {"padding": (1, -1)}, ValueError, r"padding: expected at least 0, got \(1, -1\)"),
    ("prefix_conv2d", (IMAGE, C), {"dilation": (1, 1, 1)}, ValueError, r"dilation: expected one number or two, got \(1, 1, 1\)"),
    ("prefix_conv2d", (IMAGE, C), {"stride": 1.5}, TypeError, "stride: expected an integer, got float"),
    ("prefix_conv2d", (IMAGE, C), {"padding": None}, TypeError, "padding: expected an integer, got NoneType"),
    ("prefix_conv2d", (IMAGE, C[:, :, :0]), {}, ValueError, r"weight: expected a kernel of at least 1 by 1, got \(6, 8, 0, 3\)"),
    ("prefix_conv2d", (IMAGE, D), {"groups": None}, TypeError, "groups: expected an integer, got NoneType"),
    ("prefix_conv2d", (IMAGE, C), {"dilation": 2}, ValueError, r"x: expected at least the \(3, 3\) kernel's extent"),
    ("prefix_conv2d", (IMAGE, D, None, 4), {"groups": 8}, ValueError, r"out_channels: expected 5, those of the 5 groups \(of 8\)"),
    ("prefix_conv2d", (IMAGE, D), {"groups": 3}, ValueError, "groups: expected a divisor of weight's 8 outputs, got 3"),
    ("prefix_conv2d", (IMAGE, C[:, :2]), {"groups": 3}, ValueError, "x: expected a multiple of the 2 channels of a group, got 5"),
    ("ragged_prefix_conv2d", (IMAGE, C), {**RAGGED, "in_channels": [1, 6]}, ValueError, "in_channels: expected values from 1 to 5, got 6"),
    (
        "ragged_prefix_conv2d",
        (IMAGE, C),
        {**RAGGED, "out_channels": [0, 1]},
        ValueError,
        "out_channels: expected values from 1 to 6, got 0",
    ),
    ("ragged_prefix_conv2d", (IMAGE, C), {**RAGGED, "in_channels": [1]}, ValueError, r"in_channels: expected shape \(2,\)"),
    ("ragged_prefix_conv2d", (IMAGE, C), {**RAGGED, "in_channels": [1.0, 2.0]}, TypeError, "in_channels: expected an integer, got float"),
    (
        "ragged_prefix_conv2d",
        (IMAGE, C),
        {**RAGGED, "in_channels": 2},
        TypeError,
        "in_channels: expected a tensor or a sequence of integers",
    ),
    ("ragged_prefix_conv2d", (IMAGE, C), {**RAGGED, "in_channels": [1, 1 << 70]}, ValueError, "in_channels: expected values from 1 to 5"),
    ("prefix_norm", (X,), {"kind": "group", "groups": "2"}, TypeError, "groups: expected an integer, got str"),
    ("prefix_norm", (X[0],), {}, ValueError, r"x: expected shape \(N, C, ...\), got \(5,\)"),
    ("prefix_norm", (X,), {"kind": "instance"}, ValueError, "kind: expected one of layer, group, batch, got 'instance'"),
    ("prefix_norm", (X,), {"kind": "group", "groups": 2}, ValueError, "groups: expected a divisor of x's 5 channels, got 2"),
    ("prefix_norm", (X,), {"kind": "batch", "groups": 5}, ValueError, "groups: expected 1 for kind 'batch', got 5"),
    ("prefix_norm", (X, B[:4]), {}, ValueError, r"weight: expected at least 5 entries, the channels of x, got shape \(4,\)"),
    ("prefix_norm", (X, B.int()), {}, TypeError, "weight: expected float32"),
    ("prefix_norm", (X[:1],), {"kind": "batch"}, ValueError, "x: expected more than one value per channel"),
    ("prefix_norm", (X,), {"kind": "batch", "running_mean": B}, ValueError, "running_mean, running_var: expected both or none"),
    ("prefix_norm", (X,), {"running_mean": B, "running_var": B}, ValueError, "running_mean: expected None for kind 'layer'"),
]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("op", "arguments", "settings", "error", "message"), ERRORS)
def test_errors(op: str, arguments: tuple[Any, ...], settings: dict[str, Any], error: type[Exception], message: str, backend: str) -> None:
    with taskloom.backend(backend), pytest.raises(error, match=f"^{op}: {message}"):
        getattr(taskloom, op)(*arguments, **settings)

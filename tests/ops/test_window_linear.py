"""window_linear and window_conv2d beyond their contracts: the masked form, gradients, memory, derivatives, errors, compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases_window_conv2d import conv_cases
from cases_window_linear import layer, linear_cases, starts
from compiled import compiled
from contract import assert_same_bits
from samples import weights
from torch import Tensor
from torch.nn import functional

import taskloom
from taskloom import _native

F64 = torch.float64
CONV = {"stride": 2, "padding": 1}


def masks(samples: int, channels: int, start: Tensor, width: int | Tensor) -> Tensor:
    """The masks of the card, [N, C], made one sample at a time."""
    mask = torch.zeros(samples, channels, dtype=F64)
    for n in range(samples):
        w = width if isinstance(width, int) else int(width[n])
        mask[n, int(start[n]) : int(start[n]) + w] = 1
    return mask


def masked_form(x: Tensor, weight: Tensor, bias: Tensor, start: Tensor, width: int | Tensor) -> Tensor:
    mask = masks(len(x), weight.shape[1], start, width).to(x.dtype)
    if weight.dim() == 2:
        return functional.linear(mask[:, None] * x, weight, bias)
    return functional.conv2d(mask[:, :, None, None] * x, weight, bias, stride=2, padding=1)


def run(x: Tensor, weight: Tensor, bias: Tensor, start: Tensor, width: int | Tensor) -> Tensor:
    if weight.dim() == 2:
        return taskloom.window_linear(x, weight, bias, start=start, width=width)
    return taskloom.window_conv2d(x, weight, bias, start=start, width=width, **CONV)


def leaves_of(kind: str, dtype: torch.dtype = F64, samples: int = 7) -> list[Tensor]:
    """x, weight and bias of 13 inputs and 9 outputs."""
    shape = {"rows": (samples, 1, 13), "sequences": (samples, 40, 13), "conv": (samples, 13, 6, 5)}[kind]
    return [weights(*shape, dtype=dtype), *layer(9, 13, *((3, 3) if kind == "conv" else ()), dtype=dtype)]


def results(layer_form: Callable[..., Tensor], given: list[Tensor], dtype: torch.dtype, *window: Any) -> list[Tensor]:
    """The output and the gradients of x, weight and bias."""
    leaves = [one.to(dtype).requires_grad_() for one in given]
    y = layer_form(*leaves, *window)
    back = weights(*y.shape, seed=9, dtype=given[0].dtype).to(dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, back)]


kinds = pytest.mark.parametrize("kind", ["rows", "sequences", "conv"])


@kinds
@pytest.mark.parametrize("width", [4, 7, 12, 13, torch.tensor([3, 0, 13, 5, 1, 2, 9])], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_is_the_dense_layer_of_a_masked_input(kind: str, width: int | Tensor, dtype: torch.dtype, tolerance: float) -> None:
    start = starts(7, 13 - (int(width.max()) if isinstance(width, Tensor) else width))
    given = leaves_of(kind, dtype)
    ours, theirs = results(run, given, dtype, start, width), results(masked_form, given, F64, start, width)
    for got, expected in zip(ours, theirs, strict=True):
        assert got.dtype == dtype
        assert torch.linalg.vector_norm(got.double() - expected) <= tolerance * torch.linalg.vector_norm(expected)


@kinds
def test_gradients_outside_the_windows_are_exactly_zero(kind: str) -> None:
    start = torch.tensor([5, 6, 5, 7, 6, 5, 6])
    _, for_x, for_weight, _ = results(run, leaves_of(kind, torch.float32), torch.float32, start, 4)
    seen = masks(7, 13, start, 4).bool()
    by_channel = for_x if kind == "conv" else for_x.transpose(1, 2)
    assert not by_channel[~seen].any()
    assert by_channel[seen].any()
    assert not for_weight[:, ~seen.any(0)].any()
    assert for_weight[:, seen.any(0)].abs().flatten(2).amax(2).all() if kind == "conv" else for_weight[:, seen.any(0)].all()


@kinds
def test_samples_may_come_in_any_order(kind: str) -> None:
    given, start, order = leaves_of(kind), starts(7, 6), torch.randperm(7, generator=torch.Generator().manual_seed(1))
    y = run(*given, start, 7)
    torch.testing.assert_close(run(given[0][order], *given[1:], start[order], 7), y[order], rtol=1e-12, atol=1e-12)


@kinds
def test_repeated_calls_give_the_same_bits(kind: str) -> None:
    given = leaves_of(kind, torch.float32)
    for first, second in zip(*(results(run, given, torch.float32, starts(7, 6), 7) for _ in range(2)), strict=True):
        assert_same_bits(first, second)


@kinds
def test_an_output_window_is_a_part_of_the_whole_output(kind: str) -> None:
    given, start, out_start = leaves_of(kind), starts(7, 6), torch.tensor([0, 5, 2, 2, 1, 0, 5])
    more = CONV if kind == "conv" else {}
    op = taskloom.window_conv2d if kind == "conv" else taskloom.window_linear
    leaves = [[one.clone().requires_grad_() for one in given] for _ in range(2)]
    ours = op(*leaves[0], start=start, width=7, out_start=out_start, out_width=4, **more)
    made = masks(7, 9, out_start, 4)
    whole = run(*leaves[1], start, 7) * (made[:, :, None, None] if kind == "conv" else made[:, None])
    torch.testing.assert_close(ours, whole, rtol=1e-12, atol=1e-12)
    back = weights(*ours.shape, seed=9, dtype=F64)
    for one, other in zip(torch.autograd.grad(ours, leaves[0], back), torch.autograd.grad(whole, leaves[1], back), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@kinds
def test_one_window_of_all_samples(kind: str) -> None:
    given = leaves_of(kind)
    expected = run(*given, torch.full((7,), 3), 5)
    for start, width in ((3, 5), (torch.tensor(3), 5), (torch.tensor([3] * 7), torch.tensor(5))):
        torch.testing.assert_close(run(*given, start, width), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["rows", "conv"])
def test_derivatives(kind: str) -> None:
    shape = {"rows": (3, 2, 3), "conv": (2, 3, 3, 2)}[kind]
    given = [weights(*shape, dtype=F64), *layer(2, 3, *((2, 2) if kind == "conv" else ()), dtype=F64)]
    leaves = [one.requires_grad_() for one in given]

    def whole(*leaves: Tensor) -> Tensor:
        return run(*leaves, torch.tensor([0, 1, 1])[: shape[0]], 2)

    with taskloom.backend("native"):
        assert torch.autograd.gradcheck(whole, leaves)
        found = torch.autograd.grad(whole(*leaves).square().sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match="_backward has no gradient"):
            found[0].sum().backward()
    with taskloom.backend("reference"):
        assert torch.autograd.gradgradcheck(whole, leaves)


@kinds
def test_transforms(kind: str) -> None:
    x, weight, bias = leaves_of(kind)
    start = starts(7, 6)

    def loss(weight: Tensor) -> Tensor:
        return run(x, weight, bias, start, 7).square().sum()

    leaf = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(weight), expected)
    _, tangent = torch.func.jvp(loss, (weight,), (torch.ones_like(weight),))
    torch.testing.assert_close(tangent, expected.sum())


@pytest.mark.parametrize("kind", ["rows", "conv"])
def test_compiled(kind: str) -> None:
    def loss(x: Tensor, weight: Tensor, bias: Tensor, start: Tensor) -> Tensor:
        return run(x, weight, bias, start, 7).square().sum()

    run_compiled = compiled(loss)
    for samples in (3, 7):
        gradients = []
        for function in (run_compiled, loss):
            leaves = [one.requires_grad_() for one in leaves_of(kind, samples=samples)]
            gradients.append(torch.autograd.grad(function(*leaves, starts(samples, 6)), leaves))
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("width", [32, 63])
@pytest.mark.parametrize("kind", ["sequences", "conv"])
def test_neither_a_mask_nor_a_masked_copy_nor_a_slice_is_stored(kind: str, width: int) -> None:
    samples, most = 24, 1 << 20
    shape = (samples, 1024, 64) if kind == "sequences" else (samples, 64, 32, 32)
    given = [weights(*shape), *layer(96, 64, *((3, 3) if kind == "conv" else ()))]
    start = starts(samples, 64 - width)
    sizes: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            known = {one.untyped_storage().data_ptr() for one in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
            fresh = [one for one in torch.utils._pytree.tree_leaves(result) if isinstance(one, Tensor)]
            sizes.extend(one.numel() for one in fresh if one.untyped_storage().data_ptr() not in known)
            return result

    def form(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if kind == "sequences":
            return taskloom.window_linear(x, weight, bias, start=start, width=width)
        return taskloom.window_conv2d(x, weight, bias, start=start, width=width, padding=1)

    leaves = [one.requires_grad_() for one in given]
    with Sizes():
        y = form(*leaves)
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    allowed = {y.numel(), leaves[0].numel(), leaves[1].numel()}
    assert all(size in allowed or size <= most for size in sizes)
    assert max(sizes) == y.numel()


def test_dense_where_it_is_faster_and_explained() -> None:
    x, weight = weights(64, 128), layer(96, 128)[0]
    start = torch.arange(64)
    shown = taskloom.explain("window_linear", x, weight, start=start, width=64)
    assert shown.path is not None
    assert shown.path.startswith("dense product of masked rows: 64 windows among 64 samples of 1 rows")
    assert str(shown).splitlines()[-1] == f"  path: {shown.path}"
    same = taskloom.explain("window_linear", x, weight, start=5, width=64).path
    assert same == "products of windows: 1 window among 64 samples of 1 rows"
    long = taskloom.explain("window_linear", weights(4, 256, 128), weight, start=start[:4], width=64).path
    assert long == "products of windows: 4 windows among 4 samples of 256 rows"
    images, kernel = weights(4, 100, 6, 6), layer(8, 100, 3, 3)[0]
    assert (
        taskloom.explain("window_conv2d", images, kernel, start=start[:4], width=50).path
        == "products of windows: 50% of the channels are seen"
    )
    assert str(taskloom.explain("window_conv2d", images, kernel, start=start[:4], width=96).path).startswith(
        "torch's convolution of masked samples"
    )
    assert taskloom.explain("window_linear", x, weight).path is None
    with taskloom.backend("reference"):
        assert taskloom.explain("window_linear", x, weight, start=5, width=64).path is None
    with pytest.raises(TypeError, match="pack_mask has one way only on each backend, so that start would change nothing"):
        taskloom.explain("pack_mask", x, start=start)


def test_cases_of_the_contracts_take_the_ways_that_they_are_named_after() -> None:
    for op, cases in (("window_linear", linear_cases()), ("window_conv2d", conv_cases())):
        for case in cases:
            path = str(taskloom.explain(op, *case.args, **case.kwargs).path)
            if any(name in case.name for name in ("masked rows", "nearly all")):
                assert not path.startswith("products of windows"), case.name
            if any(name in case.name for name in ("sequences", "gathered", "float32", "stride")):
                assert path.startswith("products of windows") != ("masked rows" in case.name), case.name
            if case.name.startswith("a run"):
                assert path.startswith("oneDNN's convolutions of windows"), case.name


def test_planner_groups_samples() -> None:
    generator = np.random.default_rng(0)
    for columns in (1, 2, 4):
        keys = generator.integers(-2, 3, (200, columns))
        order, bounds = _native.plan_windows(keys)
        assert (order.dtype, bounds.dtype) == (np.int64, np.int64)
        expected = np.lexsort([np.arange(200), *keys.T[::-1]])
        assert np.array_equal(order, expected)
        unique, counts = np.unique(keys, axis=0, return_counts=True)
        assert np.array_equal(np.diff(bounds), counts)
        assert np.array_equal(keys[order[bounds[:-1]]], unique)
    order, bounds = _native.plan_windows(np.zeros((0, 2), np.int64))
    assert (order.tolist(), bounds.tolist()) == ([], [0])
    with pytest.raises(ValueError, match="plan_windows: keys: expected 2 dimensions, got 1"):
        _native.plan_windows(np.zeros(3, np.int64))
    with pytest.raises(TypeError, match="plan_windows: keys: expected int64, got format i"):
        _native.plan_windows(np.zeros((3, 2), np.int32))
    with pytest.raises(ValueError, match="plan_windows: keys: expected a contiguous array"):
        _native.plan_windows(np.zeros((2, 3), np.int64).T)


X, W, IMAGE, KERNEL = torch.zeros(3, 2, 5), torch.zeros(4, 5), torch.zeros(3, 5, 6, 6), torch.zeros(4, 5, 3, 3)
HALF = {"start": torch.zeros(3, dtype=torch.int64), "width": 2}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("op", "arguments", "named", "error", "message"),
    [
        ("window_linear", (X.long(), W), {}, TypeError, "x: expected float32"),
        ("window_linear", (X[0, 0], W), {}, ValueError, r"x: expected shape \(N, ..., channels\), got \(5,\)"),
        ("window_linear", (X, W.half()), {}, TypeError, "weight: expected torch.float32, got torch.float16"),
        ("window_linear", (X, W[:, :4]), {}, ValueError, r"weight: expected shape \(out, 5\) for x \(3, 2, 5\), got \(4, 4\)"),
        ("window_linear", (X, W, W[0]), {}, ValueError, r"bias: expected shape \(4,\) as weight says, got \(5,\)"),
        ("window_linear", (X, W), {"start": torch.zeros(3)}, TypeError, "start: expected integers, got torch.float32"),
        ("window_linear", (X, W), {"start": [0, 1, 2]}, TypeError, "start: expected integers, got list"),
        (
            "window_linear",
            (X, W),
            {"start": torch.tensor([0, 1])},
            ValueError,
            r"start: expected shape \(3,\) as x has samples, or \(\), got \(2,\)",
        ),
        (
            "window_linear",
            (X, W),
            {"start": torch.tensor([0, 4, 1])},
            ValueError,
            "start: expected windows within 5 channels, got 4 to 5 for sample 1",
        ),
        (
            "window_linear",
            (X, W),
            {"start": torch.tensor([0, 0, -1])},
            ValueError,
            "start: expected windows within 5 channels, got -1 to 0 for sample 2",
        ),
        (
            "window_linear",
            (X, W),
            {"start": torch.full((3,), (1 << 63) - 1)},
            ValueError,
            "start: expected windows within 5 channels, got 9223372036854775807 to 9223372036854775808 for sample 0",
        ),
        (
            "window_linear",
            (X, W),
            {"start": torch.full((3,), 1 << 62), "width": torch.full((3,), 1 << 62)},
            ValueError,
            "start: expected windows within 5 channels, got 4611686018427387904 to 9223372036854775807 for sample 0",
        ),
        ("window_linear", (X, W), {"start": 4}, ValueError, "start: expected windows within 5 channels, got 4 to 5$"),
        ("window_linear", (X, W), {"width": 6}, ValueError, "width: expected 0 to 5, the number of channels, got 6"),
        ("window_linear", (X, W), {"width": -1}, ValueError, "width: expected 0 to 5, the number of channels, got -1"),
        ("window_linear", (X, W), {"width": 2.0}, TypeError, "width: expected an integer or a tensor of integers, got float"),
        (
            "window_linear",
            (X, W),
            {"width": torch.tensor([1, -1, 2])},
            ValueError,
            "width: expected no negative width, got -1 for sample 1",
        ),
        (
            "window_linear",
            (X, W),
            {"width": torch.tensor([1, 6, 2])},
            ValueError,
            "start: expected windows within 5 channels, got 0 to 5 for sample 1",
        ),
        (
            "window_linear",
            (X, W),
            {"out_start": 1},
            ValueError,
            "out_width: expected both out_start and out_width, or neither, got only out_start",
        ),
        (
            "window_linear",
            (X, W),
            {"out_width": 1},
            ValueError,
            "out_start: expected both out_start and out_width, or neither, got only out_width",
        ),
        (
            "window_linear",
            (X, W),
            {"out_start": torch.tensor([0, 1, 3]), "out_width": 2},
            ValueError,
            "out_start: expected windows within 4 channels, got 3",
        ),
        ("window_conv2d", (X, KERNEL), {}, ValueError, r"x: expected shape \(N, channels, H, W\), got \(3, 2, 5\)"),
        ("window_conv2d", (IMAGE, W), {}, ValueError, r"weight: expected shape \(out, 5, kh, kw\) for x \(3, 5, 6, 6\), got \(4, 5\)"),
        ("window_conv2d", (IMAGE, KERNEL), {"stride": 0}, ValueError, "stride: expected at least 1, got 0"),
        ("window_conv2d", (IMAGE, KERNEL), {"padding": (1, -1)}, ValueError, r"padding: expected at least 0, got \(1, -1\)"),
        ("window_conv2d", (IMAGE, KERNEL), {"dilation": (1, 2, 3)}, ValueError, r"dilation: expected one number or two, got \(1, 2, 3\)"),
        ("window_conv2d", (IMAGE, KERNEL), {"stride": 1.5}, TypeError, "stride: expected an integer, got float"),
        ("window_conv2d", (IMAGE, KERNEL), {"padding": "same"}, TypeError, "padding: expected an integer, got str"),
        ("window_conv2d", (IMAGE, KERNEL[:, :, :0]), {}, ValueError, r"weight: expected a kernel of at least 1 by 1, got \(4, 5, 0, 3\)"),
        ("window_conv2d", (IMAGE, KERNEL), {"dilation": 3}, ValueError, r"x: expected a padded input that holds the kernel \(3, 3\)"),
        (
            "window_conv2d",
            (IMAGE, KERNEL),
            {"start": torch.tensor([0, 1, 4])},
            ValueError,
            "start: expected windows within 5 channels, got 4 to 5 for sample 2",
        ),
    ],
)
def test_errors(backend: str, op: str, arguments: tuple[Any, ...], named: dict[str, Any], error: type[Exception], message: str) -> None:
    with taskloom.backend(backend), pytest.raises(error, match=f"{op}: {message}"):
        getattr(taskloom, op)(*arguments, **{**HALF, **named})


@pytest.mark.parametrize(("samples", "positions"), [(3, 2), (40, 1)])
def test_layers_without_outputs(samples: int, positions: int) -> None:
    """Windows of one channel each, so that the second is a dense product."""
    x = torch.randn(samples, positions, 5).requires_grad_()
    weight = torch.empty(0, 5).requires_grad_()
    y = taskloom.window_linear(x, weight, torch.empty(0), start=torch.arange(samples) % 5, width=1)
    assert y.shape == (samples, positions, 0)
    y.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert not x.grad.any()
    assert weight.grad.shape == (0, 5)


def test_tensors_of_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="window_linear: all tensors must be on one device, got meta and cpu"):
        taskloom.window_linear(X.to("meta"), W.to("meta"), **HALF)

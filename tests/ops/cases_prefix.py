"""Contracts of the ops on prefixes of channels, and of their backwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from contract import Case, Contract
from samples import weights

import taskloom
from taskloom.ops.routed import (
    prefix_conv2d_backward,
    prefix_linear_backward,
    prefix_norm_backward,
    ragged_prefix_conv2d_backward,
)

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPES = (F32, BF16, F16, F64)
ALL = (True, True, True)


def linear_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        layer = (weights(29, 37, seed=1, dtype=dtype), weights(29, seed=2, dtype=dtype))
        yield Case(f"{dtype}", (weights(11, 19, dtype=dtype), *layer, 13))
    layer = (weights(29, 37, seed=1), weights(29, seed=2))
    yield Case("whole", (weights(11, 37), *layer))
    yield Case("no bias", (weights(11, 19), layer[0], None, 13))
    yield Case("one channel", (weights(3, 1), *layer, 1))
    yield Case("a vector", (weights(19), *layer, 13))
    yield Case("a view of sequences", (weights(2, 5, 37)[..., :19], *layer, 13))
    yield Case("strided", (weights(37, 22).t()[::2, :19], weights(37, 29, seed=1).t(), weights(58, seed=2)[::2], 13))
    yield Case("no rows", (weights(0, 19), *layer, 13))
    leaves = [one.requires_grad_() for one in (weights(4, 19), weights(29, 37, seed=1), weights(29, seed=2))]
    yield Case("gradient", (*leaves, 13))


def linear_backward_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        layer = (weights(29, 37, seed=1, dtype=dtype), weights(29, seed=2, dtype=dtype))
        yield Case(f"{dtype}", (weights(11, 13, seed=3, dtype=dtype), weights(11, 19, dtype=dtype), *layer, ALL))
    yield Case("default", (weights(11, 13, seed=3), weights(11, 19), weights(29, 37, seed=1)))
    yield Case("no rows", (weights(0, 13), weights(0, 19), weights(29, 37, seed=1), weights(29, seed=2), ALL))
    for place in range(3):
        needed = [one == place for one in range(3)]
        yield Case(f"only {place}", (weights(5, 13, seed=3), weights(5, 37)[:, :19], weights(29, 37, seed=1), weights(29, seed=2), needed))


# Height and width, kernel, and the steps of a convolution of the tests.
STEPS: dict[str, tuple[tuple[int, int], tuple[int, int], dict[str, Any]]] = {
    "3x3": ((7, 9), (3, 3), {"padding": 1}),
    "1x1": ((5, 6), (1, 1), {}),
    "stride": ((9, 8), (3, 2), {"stride": (2, 3), "padding": (0, 1)}),
    "dilation": ((11, 9), (3, 3), {"dilation": 2, "padding": (2, 1)}),
    "1x1 stride": ((7, 7), (1, 1), {"stride": 2}),
}


def conv_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        layer = weights(12, 10, 3, 3, seed=1, dtype=dtype), weights(12, seed=2, dtype=dtype)
        yield Case(f"{dtype}", (weights(2, 5, 7, 6, dtype=dtype), *layer, 7), {"padding": 1, "stride": 2})
    for dtype in (BF16, F16):
        layer = weights(12, 10, 1, 1, seed=1, dtype=dtype), weights(12, seed=2, dtype=dtype)
        yield Case(f"{dtype}, 1x1", (weights(2, 5, 7, 6, dtype=dtype), *layer, 7))
    for name, (size, kernel, steps) in STEPS.items():
        layer = weights(12, 10, *kernel, seed=1), weights(12, seed=2)
        yield Case(name, (weights(3, 10, *size)[:, :5], *layer, 7), steps)
        last = weights(3, 10, *size).contiguous(memory_format=torch.channels_last)[:, :5]
        if name != "dilation":
            yield Case(f"{name}, channels last", (last, *layer, 7), steps)
        if name in ("1x1", "dilation"):
            yield Case(f"{name}, float64", (last.double(), layer[0].double(), layer[1].double(), 7), steps)
    yield Case("whole", (weights(3, 10, 13, 11), weights(12, 10, 1, 1, seed=1)))
    yield Case("depthwise", (weights(2, 6, 7, 5), weights(10, 1, 3, 3, seed=1), weights(10, seed=2)), {"padding": 1, "groups": 10})
    yield Case("multiplied", (weights(2, 3, 7, 5), weights(10, 1, 3, 3, seed=1), None, 6), {"groups": 5})
    grouped = weights(2, 6, 7, 5, dtype=F64), weights(8, 3, 3, 3, seed=1, dtype=F64), weights(8, seed=2, dtype=F64)
    yield Case("groups", grouped, {"padding": 1, "groups": 4})
    yield Case("one channel", (weights(2, 1, 4, 4), weights(3, 4, 3, 3, seed=1), None, 1), {"padding": 1})
    yield Case("one pixel", (weights(2, 5, 1, 1), weights(12, 10, 1, 1, seed=1), weights(12, seed=2), 7))
    yield Case("no samples", (weights(0, 5, 4, 4), weights(12, 10, 3, 3, seed=1), None, 7), {"padding": 1})
    yield Case("several tiles", (weights(2, 33, 9, 9), weights(80, 50, 3, 3, seed=1, scale=0.1), None, 70), {"padding": 1})
    leaves = [one.requires_grad_() for one in (weights(2, 5, 4, 5), weights(8, 6, 3, 3, seed=1), weights(8, seed=2))]
    yield Case("gradient", (*leaves, 7), {"padding": 1})


def conv_backward_cases() -> Iterator[Case]:
    def given(dtype: torch.dtype, name: str, groups: int = 1) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        size, kernel, steps = STEPS[name]
        steps = {key: value if isinstance(value, tuple) else (value, value) for key, value in steps.items()}
        x, weight = weights(3, 5, *size, dtype=dtype), weights(12, 10, *kernel, seed=1, dtype=dtype)
        y = taskloom.prefix_conv2d(x, weight, None, 7, **steps)
        return (weights(*y.shape, seed=3, dtype=dtype), x, weight, weights(12, seed=2, dtype=dtype)), steps

    for dtype, names in ((F32, tuple(STEPS)), (BF16, ("3x3",)), (F16, ("1x1",)), (F64, ("stride",))):
        for name in names:
            tensors, steps = given(dtype, name)
            yield Case(f"{dtype}, {name}", tensors, {**steps, "needed": ALL})
    for place in range(3):
        tensors, steps = given(F32, "3x3")
        yield Case(f"only {place}", tensors, {**steps, "needed": [one == place for one in range(3)]})
    tensors, steps = given(F32, "1x1")
    yield Case("default", tensors[:3], steps)
    depthwise = weights(2, 6, 7, 5, seed=3), weights(2, 6, 7, 5), weights(10, 1, 3, 3, seed=1), weights(10, seed=2)
    yield Case("depthwise", depthwise, {"padding": (1, 1), "groups": 10, "needed": ALL})
    empty = weights(0, 7, 4, 4), weights(0, 5, 4, 4), weights(12, 10, 3, 3, seed=1), weights(12, seed=2)
    yield Case("no samples", empty, {"padding": (1, 1), "needed": ALL})
    wide = weights(2, 70, 9, 9, seed=3, scale=0.1), weights(2, 33, 9, 9), weights(80, 50, 3, 3, seed=1, scale=0.1)
    yield Case("several tiles", wide, {"padding": (1, 1)})


def widths(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def ragged_cases() -> Iterator[Case]:
    mixed = {"in_channels": widths(5, 10, 5, 1), "out_channels": widths(7, 12, 7, 3)}
    for dtype in DTYPES:
        layer = weights(12, 10, 3, 3, seed=1, dtype=dtype), weights(12, seed=2, dtype=dtype)
        yield Case(f"{dtype}", (weights(4, 10, 7, 6, dtype=dtype), *layer), {**mixed, "padding": 1, "stride": 2})
    layer = weights(12, 10, 1, 1, seed=1), weights(12, seed=2)
    yield Case("1x1", (weights(4, 10, 7, 6), *layer), mixed)
    last = weights(4, 10, 7, 6).contiguous(memory_format=torch.channels_last)
    yield Case("channels last", (last, *layer), mixed)
    yield Case("numbers", (weights(2, 6, 7, 6), weights(12, 10, 3, 3, seed=1)), {"in_channels": [4, 6], "out_channels": [12, 5]})
    same = {"in_channels": widths(5, 5, 4), "out_channels": widths(7, 7, 8).int()}
    yield Case("neighbours", (weights(3, 10, 7, 6)[:, :5], *layer), same)
    yield Case("no samples", (weights(0, 10, 4, 4), *layer), {"in_channels": widths(), "out_channels": widths()})
    leaves = [one.requires_grad_() for one in (weights(2, 5, 4, 5), weights(8, 6, 3, 3, seed=1), weights(8, seed=2))]
    yield Case("gradient", tuple(leaves), {"in_channels": widths(2, 5), "out_channels": widths(8, 3), "padding": 1})


def ragged_backward_cases() -> Iterator[Case]:
    mixed = {"in_channels": widths(5, 10, 5, 1), "out_channels": widths(7, 12, 7, 3)}
    for dtype in (F32, BF16, F64):
        layer = weights(12, 10, 3, 3, seed=1, dtype=dtype), weights(12, seed=2, dtype=dtype)
        given = weights(4, 12, 4, 4, seed=3, dtype=dtype), weights(4, 10, 7, 7, dtype=dtype), *layer
        yield Case(f"{dtype}", given, {**mixed, "stride": (2, 2), "padding": (1, 1), "needed": ALL})
    given = weights(4, 12, 5, 6, seed=3), weights(4, 10, 5, 6), weights(12, 10, 1, 1, seed=1), weights(12, seed=2)
    yield Case("1x1", given, {**mixed, "needed": ALL})
    for place in range(3):
        yield Case(f"only {place}", given, {**mixed, "needed": [one == place for one in range(3)]})
    empty = weights(0, 12, 5, 6), weights(0, 10, 5, 6), weights(12, 10, 1, 1, seed=1)
    yield Case("no samples", empty, {"in_channels": widths(), "out_channels": widths()})


def _affine(dtype: torch.dtype = F32) -> tuple[torch.Tensor, torch.Tensor]:
    return weights(11, seed=1, dtype=dtype), weights(11, seed=2, dtype=dtype)


def norm_cases() -> Iterator[Case]:
    running = {"running_mean": weights(11, seed=3), "running_var": weights(11, seed=4).square() + 0.5}
    kinds: dict[str, dict[str, Any]] = {
        "layer": {"kind": "layer"},
        "group": {"kind": "group", "groups": 4},
        "batch": {"kind": "batch"},
        "running": {"kind": "batch", **running},
    }
    for (name, settings), dtype in zip(kinds.items(), DTYPES, strict=True):
        yield Case(f"{name}, {dtype}", (weights(3, 8, 5, 4, dtype=dtype), *_affine(dtype)), {**settings, "relu": True})
        yield Case(f"{name}, mixed", (weights(3, 8, 5, 4, dtype=BF16), *_affine()), {**settings, "eps": 0.1})
        last = weights(3, 11, 5, 4).contiguous(memory_format=torch.channels_last)
        yield Case(f"{name}, channels last", (last[:, :8], *_affine()), {**settings, "relu": True})
    for name in ("layer", "batch"):
        yield Case(f"{name}, no affine", (weights(3, 8, 7)[:, :, ::2],), kinds[name])
        yield Case(f"{name}, rows", (weights(6, 8), _affine()[0]), kinds[name])
        leaves = [one.requires_grad_() for one in (weights(3, 8, 4), *_affine())]
        yield Case(f"{name}, gradient", tuple(leaves), {**kinds[name], "relu": True})


def norm_backward_cases() -> Iterator[Case]:
    for dtype in (BF16, F64, F32):
        gradient, x = weights(3, 8, 5, 4, seed=5, dtype=dtype), weights(3, 8, 5, 4, dtype=dtype)
        wide = x.double() if dtype == F64 else x.float()
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        grouped_var, grouped_mean = torch.var_mean(wide.reshape(3, 4, -1), 2, correction=0)
        yield Case(f"batch, {dtype}", (gradient, x, *_affine(dtype), mean, var), {"kind": "batch", "relu": True})
        if dtype == F32:
            yield Case("running", (gradient, x, *_affine(dtype), mean + 1, var), {"kind": "batch", "running": True})
        yield Case(f"group, {dtype}", (gradient, x, *_affine(dtype), grouped_mean, grouped_var), {"kind": "group", "relu": True})
    given = gradient, x
    moments = mean, var
    yield Case("no affine", (*given, None, None, *moments), {"kind": "batch", "needed": (True, False, False)})
    yield Case("only weight", (*given, _affine()[0], None, *moments), {"kind": "batch", "needed": (False, True, False)})
    grouped = {"kind": "group", "needed": (True, False, True)}
    yield Case("bias alone", (*given, None, _affine()[1], grouped_mean, grouped_var), grouped)
    yield Case("only bias", (*given, *_affine(), *moments), {"kind": "batch", "needed": (False, False, True), "relu": True})


CONTRACTS = (
    Contract("prefix_linear", taskloom.prefix_linear, linear_cases, torch_products=True),
    Contract("prefix_linear_backward", prefix_linear_backward, linear_backward_cases, torch_products=True),
    Contract("prefix_conv2d", taskloom.prefix_conv2d, conv_cases, torch_products=True),
    Contract("prefix_conv2d_backward", prefix_conv2d_backward, conv_backward_cases, torch_products=True),
    Contract("ragged_prefix_conv2d", taskloom.ragged_prefix_conv2d, ragged_cases, torch_products=True),
    Contract("ragged_prefix_conv2d_backward", ragged_prefix_conv2d_backward, ragged_backward_cases, torch_products=True),
    Contract("prefix_norm", taskloom.prefix_norm, norm_cases, torch_products=True),
    Contract("prefix_norm_backward", prefix_norm_backward, norm_backward_cases, torch_products=True),
)

"""Contracts of the norms of channel windows and of channel_scale, with their backwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from contract import Case, Contract
from samples import weights
from torch import Tensor

import taskloom
from taskloom import reference
from taskloom.ops.routed import channel_scale_backward, window_group_norm_silu_backward, window_layer_norm_backward

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
STARTS = torch.tensor([0, 5, 17])
WIDTHS = torch.tensor([20, 1, 37 - 17])


def _slices(*shape: int) -> Tensor:
    """A tensor whose entries do not lie next to each other."""
    return weights(*shape[:-1], 2 * shape[-1])[..., ::2]


def layer_norm_cases() -> Iterator[Case]:
    window = {"start": STARTS, "width": 20}
    for dtype in (BF16, F64):
        x = weights(3, 5, 37, dtype=dtype)
        yield Case(f"{dtype}", (x, weights(3, 37, seed=1, dtype=dtype), weights(3, 37, seed=2, dtype=dtype)), window)
    x = weights(3, 5, 37)
    yield Case("mixed", (x.half(), weights(3, 37, seed=1), weights(3, 37, seed=2, dtype=F64)), window)
    yield Case("plain", (x + 3,), window)
    yield Case("shift", (x.half(), weights(3, 37, seed=1)), window | {"eps": 0.1})
    yield Case("scale", (x, None, weights(3, 37, seed=2)), {"start": STARTS.int(), "width": WIDTHS})
    yield Case("one channel", (weights(2, 3, 1),), {"start": torch.tensor(0), "width": 1})
    yield Case("strided", (_slices(3, 2, 5, 37), _slices(3, 37), weights(37, 3, seed=2).t()), window)
    yield Case("two pieces", (weights(2, 70, 1030), weights(2, 1030, seed=1)), {"start": torch.tensor([7, 30]), "width": 1000})
    yield Case("no rows", (weights(3, 0, 37), weights(3, 37)), window)
    yield Case("no samples", (weights(0, 5, 37),), {"start": torch.zeros(0, dtype=torch.int64), "width": 3})
    leaves = [one.requires_grad_() for one in (weights(3, 5, 37), weights(3, 37, seed=1), weights(3, 37, seed=2))]
    yield Case("gradient", tuple(leaves), window)


def layer_norm_backward_cases() -> Iterator[Case]:
    window: dict[str, Any] = {"start": STARTS, "width": 20}
    for dtype in (F32, BF16):
        x, scale = weights(3, 5, 37, dtype=dtype), weights(3, 37, seed=2, dtype=dtype)
        given = (weights(3, 5, 37, seed=7, dtype=dtype), x, weights(3, 37, seed=1, dtype=dtype), scale)
        found = reference.routed.window_layer_norm(x, None, scale, STARTS, 20, None, 1e-6)[1:]
        yield Case(f"{dtype}", (*given, *found), window)
        if dtype == F32:
            slopes = {"for_mean": weights(3, 5, seed=8), "for_rstd": weights(3, 5, seed=9)}
            yield Case("only x, inside", (*given, *found), window | slopes | {"outside": False, "for_modulation": False})
            yield Case("only the modulation, inside", (*given, *found), window | {"outside": False, "for_x": False})
            yield Case("not modulated", (*given[:2], None, None, *found), {"start": STARTS.int(), "width": WIDTHS} | slopes)
    x = weights(2, 70, 1030)
    window = {"start": torch.tensor([7, 30]), "width": 1000}
    found = reference.routed.window_layer_norm(x, None, None, window["start"], 1000, None, 1e-6)[1:]
    yield Case("two pieces", (weights(2, 70, 1030, seed=1), x, weights(2, 1030), weights(2, 1030), *found), window)
    none = torch.empty(3, 0)
    yield Case("no rows", (weights(3, 0, 37), weights(3, 0, 37), weights(3, 37), None, none, none), {"start": STARTS, "width": 20})


def group_norm_cases() -> Iterator[Case]:
    window = {"groups": 4, "start": torch.tensor([0, 5, 17]), "width": 7}
    for dtype in (BF16, F64):
        given = (weights(3, 24, 3, 5, dtype=dtype), weights(24, seed=1, dtype=dtype), weights(24, seed=2, dtype=dtype))
        yield Case(f"{dtype}", given, window)
    x = weights(3, 24, 3, 5)
    yield Case("mixed", (x.half(), weights(24, seed=1), weights(24, seed=2, dtype=F64)), window)
    yield Case("plain", (x + 3,), window | {"eps": 0.1})
    yield Case(
        "weight", (x.half(), weights(24, seed=1)), window | {"width": torch.tensor([24, 1, 3]), "start": torch.tensor([0, 5, 9]).int()}
    )
    yield Case("bias", (_slices(3, 24, 5), None, weights(48)[::2]), window | {"groups": 1})
    yield Case("channels of their own", (weights(3, 24),), window | {"groups": 24})
    yield Case("many places", (weights(2, 8, 1100), weights(8, seed=1)), {"groups": 2, "start": torch.tensor([1, 2]), "width": 4})
    yield Case("no samples", (weights(0, 24, 5),), {"groups": 4, "start": torch.zeros(0, dtype=torch.int64), "width": 3})
    leaves = [one.requires_grad_() for one in (weights(3, 24, 3, 5), weights(24, seed=1), weights(24, seed=2))]
    yield Case("gradient", tuple(leaves), window)


def group_norm_backward_cases() -> Iterator[Case]:
    start = torch.tensor([0, 5, 17])
    window = {"groups": 4, "start": start, "width": 7}
    for dtype in (F32, BF16):
        x, weight, bias = weights(3, 24, 15, dtype=dtype), weights(24, seed=1, dtype=dtype), weights(24, seed=2, dtype=dtype)
        found = reference.routed.window_group_norm_silu(x, weight, bias, 4, start, 7, None, 1e-5)[1:]
        given = (weights(3, 24, 15, seed=7, dtype=dtype), x, weight, bias, *found)
        yield Case(f"{dtype}", given, window)
        if dtype == F32:
            slopes = {"for_mean": weights(3, 4, seed=8), "for_rstd": weights(3, 4, seed=9)}
            yield Case("only x, inside", given, window | slopes | {"outside": False, "for_affine": False})
            yield Case("only the affine part, inside", given, window | {"outside": False, "for_x": False})
            plain = (*given[:2], None, None, *found)
            yield Case("plain", plain, window | slopes | {"start": start.int(), "width": torch.tensor([24, 1, 3])})
    x = weights(2, 8, 1100)
    found = reference.routed.window_group_norm_silu(x, None, None, 2, torch.tensor([1, 2]), 4, None, 1e-5)[1:]
    given = (weights(2, 8, 1100, seed=1), x, weights(8, seed=2), weights(8, seed=3), *found)
    yield Case("many places", given, {"groups": 2, "start": torch.tensor([1, 2]), "width": 4})
    none = torch.empty(0, 4)
    yield Case("no samples", (weights(0, 24, 5), weights(0, 24, 5), weights(24), None, none, none), window | {"start": start[:0]})


def scale_cases() -> Iterator[Case]:
    window = {"start": torch.tensor([0, 5, 17]), "width": 7}
    scale, bias = weights(3, 24, seed=1), weights(24, seed=2)
    for activation in (None, "relu", "gelu", "silu"):
        yield Case(f"{activation}", (30 * weights(3, 24, 5, 7), scale, bias), window | {"activation": activation})
    for dtype, activation in ((BF16, "silu"), (F64, "gelu")):
        yield Case(f"{dtype}", (weights(3, 24, 35, dtype=dtype), scale.to(dtype)), window | {"activation": activation})
    one = {"width": torch.tensor([24, 1, 3]), "start": torch.tensor([0, 5, 9]).int()}
    yield Case("one place", (weights(3, 24), scale, bias), window | one)
    yield Case("few places", (_slices(3, 24, 5).half(), weights(24, 3).t(), weights(48)[::2].double()), window | {"activation": "relu"})
    yield Case("many places", (weights(2, 3, 1100), weights(2, 3)), {"activation": "silu"})
    yield Case("many channels", (weights(2, 5000), weights(2, 5000, seed=1)), {"start": torch.tensor([100, 4000]), "width": 900})
    yield Case("no places", (weights(3, 24, 0), scale, bias), window)
    leaves = [one.requires_grad_() for one in (weights(3, 24, 5), weights(3, 24, seed=1), weights(24, seed=2))]
    yield Case("gradient", tuple(leaves), window | {"activation": "silu"})


def scale_backward_cases() -> Iterator[Case]:
    window = {"start": torch.tensor([0, 5, 17]), "width": 7}
    x, scale, bias = weights(3, 24, 35), weights(3, 24, seed=1), weights(24, seed=2)
    for activation in (None, "relu", "gelu", "silu"):
        yield Case(f"{activation}", (weights(3, 24, 35, seed=7), 3 * x, scale, bias), window | {"activation": activation})
    half = [one.bfloat16() for one in (weights(3, 24, 35, seed=7), x, scale, bias)]
    yield Case("bfloat16", tuple(half), window | {"activation": "silu"})
    given = (weights(3, 24, 5, seed=7), weights(3, 24, 5), scale, bias)
    yield Case("few places, only scale", given, window | {"activation": "gelu", "for_x": False, "for_bias": False})
    yield Case("all channels, only x", given[:3], {"activation": "silu", "for_scale": False})
    yield Case("widths", given, {"width": torch.tensor([24, 1, 3]), "start": torch.tensor([0, 5, 9]).int()})
    yield Case("many places", (weights(2, 3, 1100, seed=1), weights(2, 3, 1100), weights(2, 3), weights(3)), {"activation": "silu"})
    yield Case("no places", (weights(3, 24, 0), weights(3, 24, 0), *given[2:]), window)


CONTRACTS = (
    Contract("window_layer_norm", taskloom.window_layer_norm, layer_norm_cases),
    Contract("window_layer_norm_backward", window_layer_norm_backward, layer_norm_backward_cases),
    Contract("window_group_norm_silu", taskloom.window_group_norm_silu, group_norm_cases),
    Contract("window_group_norm_silu_backward", window_group_norm_silu_backward, group_norm_backward_cases),
    Contract("channel_scale", taskloom.channel_scale, scale_cases),
    Contract("channel_scale_backward", channel_scale_backward, scale_backward_cases),
)

"""Contracts of window_conv2d and its backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from cases_window_linear import BF16, F16, F32, F64, layer, starts
from contract import Case, Contract
from samples import weights

import taskloom
from taskloom.ops.routed import window_conv2d_backward


def conv_cases() -> Iterator[Case]:
    half = {"start": starts(3, 6), "width": 7}
    large = weights(2, 40, 22, 21, dtype=BF16), *layer(48, 40, 3, 3, dtype=BF16)
    yield Case("bfloat16, large", large, {"start": starts(2, 30), "width": 10, "padding": 1})
    for dtype in (F32, BF16, F16, F64):
        yield Case(f"{dtype}", (weights(3, 13, 6, 5, dtype=dtype), *layer(9, 13, 3, 3, dtype=dtype)), {**half, "padding": 1})
    x = weights(3, 13, 11, 12)
    yield Case("pointwise", (x, *layer(9, 13, 1, 1)), half)
    yield Case("pointwise, strided", (x, *layer(9, 13, 1, 1)), {**half, "stride": 2})
    yield Case("stride", (x, *layer(9, 13, 3, 3)), {**half, "stride": 2, "padding": 1})
    yield Case("pairs", (x, *layer(9, 13, 3, 2)), {**half, "stride": (1, 2), "padding": (2, 1), "dilation": (2, 3)})
    yield Case("no padding", (x, layer(9, 13, 5, 4)[0]), half)
    yield Case("nearly all channels", (x, *layer(9, 13, 3, 3)), {"start": starts(3, 1), "width": 12, "padding": 1})
    widths = torch.tensor([13, 0, 4])
    yield Case("widths", (x, *layer(9, 13, 3, 3)), {"start": torch.tensor([0, 13, 9]), "width": widths, "padding": 1})
    yield Case("one window", (x, *layer(9, 13, 3, 3)), {"start": torch.tensor(4), "width": 5, "padding": 1})
    few = {"start": torch.tensor([4, 4, 4, 4, 13]), "width": torch.tensor([5, 5, 5, 5, 0])}
    yield Case("a run", (weights(5, 13, 7, 6), *layer(9, 13, 3, 3)), {**few, "padding": 1})
    yield Case("a run of pixels", (weights(5, 13, 1, 6), *layer(1, 13, 1, 1)), few)
    runs = {"start": torch.tensor([6, 6, 6, 6, 2, 2, 2, 2]), "width": 7, "stride": 2, "padding": 1}
    last = weights(8, 13, 7, 6).to(memory_format=torch.channels_last)
    yield Case("runs", (last, *layer(9, 13, 3, 3)), runs)
    out = {"out_start": torch.tensor([0, 6, 3]), "out_width": 3}
    yield Case("outputs", (x, *layer(9, 13, 3, 3)), {**half, "padding": 1, **out})
    out = {"out_start": torch.tensor([0, 6, 3]), "out_width": torch.tensor([9, 0, 2])}
    yield Case("output widths", (x.to(BF16), *layer(9, 13, 3, 3, dtype=BF16)), {**half, "padding": 1, **out})
    last = x.to(memory_format=torch.channels_last)
    yield Case("channels last", (last, *layer(9, 13, 3, 3)), {**half, "padding": 1})
    yield Case("channels last, pointwise", (last, *layer(9, 13, 1, 1)), half)
    values = x.clone()
    values[:, :5], values[:, 11:] = torch.nan, torch.inf
    yield Case("NaN outside", (values, *layer(9, 13, 3, 3)), {"start": torch.tensor([5, 6, 5]), "width": 5, "padding": 1})
    yield Case("no samples", (weights(0, 13, 6, 5), *layer(9, 13, 3, 3)), {"start": starts(0, 6), "width": 7})
    yield Case("no width", (x, *layer(9, 13, 3, 3)), {"start": starts(3, 13), "width": 0})
    leaves = [one.requires_grad_() for one in (weights(3, 7, 4, 4), *layer(5, 7, 2, 2))]
    yield Case("gradient", tuple(leaves), {"start": torch.tensor([0, 3, 1]), "width": 4})


def backward_cases() -> Iterator[Case]:
    plain = ((1, 1), (1, 1), (1, 1))
    for dtype in (F32, BF16, F64):
        given = (weights(3, 9, 6, 5, seed=7, dtype=dtype), weights(3, 13, 6, 5, dtype=dtype), layer(9, 13, 3, 3, dtype=dtype)[0])
        yield Case(f"{dtype}", (*given, starts(3, 6), 7, None, None, 0, None, *plain))
        for place in range(3 if dtype == F32 else 0):
            needed = [one == place for one in range(3)]
            yield Case(f"only {place}", (*given, starts(3, 6), 7, None, None, 0, None, *plain, needed))
    given = (weights(3, 9, 6, 5, seed=7), weights(3, 13, 6, 5), layer(9, 13, 3, 3)[0])
    yield Case("nearly all channels", (*given, starts(3, 1), 12, None, None, 0, None, *plain))
    yield Case("outputs", (*given, starts(3, 6), 7, None, torch.tensor([0, 6, 3]), 3, None, *plain))
    widths = (starts(3, 6), 13, torch.tensor([7, 0, 2]), torch.tensor([0, 6, 3]), 9, torch.tensor([3, 1, 6]))
    yield Case("widths", (*given, *widths, *plain))
    sparse = (weights(3, 9, 4, 5, seed=7), weights(3, 13, 7, 8), layer(9, 13, 3, 2)[0])
    yield Case("stride, dilation", (*sparse, starts(3, 6), 7, None, None, 0, None, (2, 2), (2, 1), (2, 1)))
    point = (weights(3, 9, 6, 5, seed=7), weights(3, 13, 6, 5), layer(9, 13, 1, 1)[0])
    yield Case("pointwise", (*point, starts(3, 6), 7))
    few = (torch.tensor([4, 4, 4, 4, 13]), 13, torch.tensor([5, 5, 5, 5, 0]))
    run = (weights(5, 9, 6, 5, seed=7), weights(5, 13, 6, 5).to(memory_format=torch.channels_last), layer(9, 13, 3, 3)[0])
    yield Case("a run", (*run, *few, None, 0, None, *plain))
    yield Case("a run, only 1", (*run, *few, None, 0, None, *plain, (False, True, False)))
    pixels = (weights(5, 1, 1, 6, seed=7), weights(5, 13, 1, 6), layer(1, 13, 1, 1)[0])
    yield Case("a run of pixels", (*pixels, torch.tensor(4), 5))
    large = weights(2, 48, 22, 21, seed=7, dtype=BF16), weights(2, 40, 22, 21, dtype=BF16), layer(48, 40, 3, 3, dtype=BF16)[0]
    yield Case("bfloat16, large", (*large, starts(2, 30), 10, None, None, 0, None, *plain))
    yield Case("no samples", (weights(0, 9, 6, 5), weights(0, 13, 6, 5), layer(9, 13, 1, 1)[0], starts(0, 6), 7))


CONTRACTS = (
    Contract("window_conv2d", taskloom.window_conv2d, conv_cases, torch_products=True),
    Contract("window_conv2d_backward", window_conv2d_backward, backward_cases, torch_products=True),
)

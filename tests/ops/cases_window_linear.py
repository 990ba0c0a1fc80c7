"""Contracts of window_linear and its backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from contract import Case, Contract
from samples import weights

import taskloom
from taskloom.ops.routed import window_linear_backward

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def starts(samples: int, most: int, seed: int = 0, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """A start for each sample, from 0 to ``most``."""
    return torch.randint(0, most + 1, (samples,), generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(*shape: int, dtype: torch.dtype = F32) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and a bias."""
    return weights(*shape, seed=1, dtype=dtype, scale=0.2), weights(shape[0], seed=2, dtype=dtype)


def linear_cases() -> Iterator[Case]:
    for dtype in (F32, BF16, F16, F64):
        # Samples of many rows take a product each; those of one row, most of whose windows differ, one masked product together.
        mixed = {"start": starts(5, 18), "width": 19}
        yield Case(f"{dtype}, sequences", (weights(5, 33, 37, dtype=dtype), *layer(29, 37, dtype=dtype)), mixed)
        yield Case(
            f"{dtype}, masked rows", (weights(9, 37, dtype=dtype), *layer(29, 37, dtype=dtype)), {"start": starts(9, 18), "width": 19}
        )
    widths = torch.tensor([3, 37, 0, 20, 11])
    yield Case("widths", (weights(5, 40, 37), *layer(29, 37)), {"start": torch.tensor([34, 0, 37, 5, 5]), "width": widths})
    few = torch.tensor([2, 9, 2, 9, 2, 9, 2, 9], dtype=torch.int64)
    yield Case("gathered rows", (weights(8, 3, 37), *layer(29, 37)), {"start": few, "width": 6})
    yield Case("one window", (weights(4, 2, 3, 37), layer(29, 37)[0]), {"start": torch.tensor(7, dtype=torch.int16), "width": 8})
    yield Case("a number", (weights(4, 37), *layer(29, 37)), {"start": 4, "width": 30})
    yield Case("all channels", (weights(4, 2, 37), *layer(29, 37)), {"start": torch.zeros(4, dtype=torch.int64), "width": 37})
    out = {"out_start": torch.tensor([0, 4, 20, 4, 9]), "out_width": 9}
    yield Case("outputs", (weights(5, 40, 37), *layer(29, 37)), {"start": starts(5, 18), "width": 19, **out})
    out = {"out_start": torch.tensor([0, 4, 20, 4, 9]), "out_width": torch.tensor([29, 0, 1, 7, 20])}
    yield Case("outputs of one row", (weights(5, 37, dtype=BF16), *layer(29, 37, dtype=BF16)), {"start": starts(5, 18), "width": 19, **out})
    yield Case("outputs, one window", (weights(5, 37), *layer(29, 37)), {"start": 3, "width": 19, "out_start": 2, "out_width": 20})
    weight, bias = layer(29, 37)
    strided = (weights(37, 33, 5).permute(2, 1, 0), weight.t().contiguous().t(), bias)
    yield Case("strided", strided, {"start": starts(5, 18), "width": 19})
    values = weights(5, 33, 37)
    values[:, :, :9], values[:, :, 30:] = torch.nan, torch.inf
    yield Case("NaN outside", (values, *layer(29, 37)), {"start": torch.tensor([9, 10, 11, 12, 9]), "width": 18})
    yield Case("NaN outside, masked rows", (values.view(-1, 37)[:24], *layer(29, 37)), {"start": 9 + starts(24, 3), "width": 18})
    yield Case("no samples", (weights(0, 3, 37), *layer(29, 37)), {"start": starts(0, 18), "width": 19})
    yield Case("no rows", (weights(3, 0, 37), *layer(29, 37)), {"start": starts(3, 18), "width": 19})
    yield Case("no width", (weights(3, 2, 37), *layer(29, 37)), {"start": starts(3, 37), "width": 0})
    leaves = [one.requires_grad_() for one in (weights(4, 3, 7), *layer(5, 7))]
    yield Case("gradient", tuple(leaves), {"start": torch.tensor([0, 3, 1, 3]), "width": 4})


def backward_cases() -> Iterator[Case]:
    for dtype in (F32, BF16, F64):
        for name, samples, rows in (("sequences", 5, 33), ("masked rows", 24, 1)):
            given = (
                weights(samples, rows, 29, seed=7, dtype=dtype),
                weights(samples, rows, 37, dtype=dtype),
                layer(29, 37, dtype=dtype)[0],
            )
            yield Case(f"{dtype}, {name}", (*given, starts(samples, 18), 19))
            for place in range(3 if dtype == F32 and rows > 1 else 0):
                needed = [one == place for one in range(3)]
                yield Case(f"{name}, only {place}", (*given, starts(samples, 18), 19, None, None, 0, None, needed))
    given = (weights(8, 3, 29, seed=7), weights(8, 3, 37), layer(29, 37)[0])
    yield Case("gathered rows", (*given, torch.tensor([2, 9, 2, 9, 2, 9, 2, 9]), 6))
    out = (torch.tensor([0, 4, 20, 4, 9, 9, 9, 9]), 9, None)
    yield Case("outputs", (*given, starts(8, 18), 19, None, *out))
    yield Case("widths", (*given, starts(8, 18), 37, torch.tensor([0, 1, 19, 7, 19, 3, 2, 5]), *out[:2], starts(8, 9, seed=3)))
    yield Case("no samples", (weights(0, 3, 29), weights(0, 3, 37), layer(29, 37)[0], starts(0, 18), 19))


CONTRACTS = (
    Contract("window_linear", taskloom.window_linear, linear_cases, torch_products=True),
    Contract("window_linear_backward", window_linear_backward, backward_cases, torch_products=True),
)

"""Contracts of magnitude_threshold, magnitude_histogram and magnitude_mask."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from contract import Case, Contract
from samples import checkpoints, normal, with_specials

import taskloom

LARGE = (1 << 18) + 77


def threshold_cases() -> Iterator[Case]:
    for size in (1, 2, 63, 1001):
        yield Case(f"{size}", (normal(size),), {"rank": list(range(0, size + 1, max(1, size // 9)))})
    yield Case("empty", (torch.empty(0),), {"rank": 0})
    yield Case("scalar", (torch.tensor(-3.0), torch.tensor(1.0)), {"density": 1.0})
    yield Case("large", (normal(LARGE), normal(LARGE, seed=1)), {"rank": [0, 1, 9, LARGE // 5, LARGE - 1, LARGE]})
    yield Case("large bfloat16", (normal(LARGE, dtype=torch.bfloat16), normal(LARGE, seed=1, dtype=torch.bfloat16)), {"density": 0.2})
    yield Case("all equal", (torch.full((LARGE,), -2.0),), {"rank": [1, 1000, LARGE - 1, LARGE]})
    yield Case("float64", (normal(301).double() * 1e-30,), {"rank": [1, 150, 301]})
    yield Case("mixed", (normal(301, dtype=torch.float16), normal(301).double()), {"density": 0.5})
    yield Case("specials", (with_specials(301),), {"rank": [1, 30, 100, 200, 301]})
    yield Case("transposed", (normal(31, 65).t(), normal(65, 31, seed=1)), {"density": 0.3})
    parts = (normal(17), torch.empty(0), normal(5, 300, seed=1, dtype=torch.bfloat16), torch.tensor(2.0))
    yield Case("list", (list(parts),), {"rank": [0, 1, 400, 1517, 1518]})
    yield Case("list with ties", ([part.round() for part in parts], [torch.zeros_like(part) for part in parts]), {"rank": 700})
    yield Case("list mixed", ([parts[0].double(), parts[2]],), {"density": 0.4})
    yield Case("rows", (normal(7, 33), normal(7, 33, seed=1)), {"rank": [0, 1, 12, 33], "scope": "row"})
    yield Case("rows of one", (normal(3, 5, 1),), {"density": 1.0, "scope": "row"})
    yield Case("rows of specials", (with_specials(9, 40).double(),), {"density": 0.5, "scope": "row"})
    yield Case("empty rows", (torch.empty(4, 0),), {"rank": 0, "scope": "row"})
    yield Case("no rows", (torch.empty(0, 4),), {"rank": [1, 2], "scope": "row"})


def histogram_cases() -> Iterator[Case]:
    yield Case("top digit", (normal(1001), normal(1001, seed=1)), {"shift": 16})
    yield Case("low digit", (normal(1001, dtype=torch.bfloat16).round(),), {"shift": 0, "prefix": 0x3F80})
    yield Case("large", (normal(5, LARGE).t(),), {"shift": 16})
    for shift, prefix in ((48, 0), (32, 0x3FF0), (16, 0x3FF00000), (0, 0x3FF000000000)):
        yield Case(f"wide {shift}", (with_specials(301),), {"shift": shift, "prefix": prefix, "wide": True})
    yield Case("empty", (torch.empty(0, dtype=torch.float64),), {"shift": 48})


def mask_cases() -> Iterator[Case]:
    for packed in (False, True):
        name = "packed " if packed else ""
        base, (tuned, *_) = checkpoints(37, 29, dtype=torch.bfloat16)
        yield Case(f"{name}density", (tuned, base), {"density": 0.3, "packed": packed})
        yield Case(f"{name}band", (tuned, base), {"density": 0.3, "gamma": 0.05, "packed": packed})
        yield Case(f"{name}rows", (tuned, base), {"rank": (2, 11), "scope": "row", "packed": packed})
        yield Case(f"{name}transposed", (tuned.t(), base.t()), {"rank": 100, "packed": packed})
        yield Case(f"{name}large", (normal(3, LARGE // 3).round(),), {"density": 0.4, "gamma": 0.1, "packed": packed})
        yield Case(f"{name}large rows", (normal(20, LARGE // 9).round(),), {"density": 0.4, "scope": "row", "packed": packed})
        yield Case(f"{name}one row", (normal(1, 301),), {"density": 0.4, "scope": "row", "packed": packed})
        yield Case(f"{name}empty", (torch.empty(0),), {"density": 0.4, "packed": packed})
        yield Case(f"{name}scalar", (torch.tensor(0.0),), {"rank": 1, "packed": packed})
    yield Case("specials", (with_specials(301),), {"rank": (10, 140)})
    yield Case("float64 rows", (with_specials(9, 40).double(),), {"rank": (3, 21), "scope": "row"})
    values = with_specials(1001)
    yield Case("threshold", (values,), {"threshold": taskloom.magnitude_threshold(values, rank=333)})
    yield Case("two thresholds", (values,), {"threshold": taskloom.magnitude_threshold(values, rank=[0, 333])})
    yield Case("float32 threshold of float64", (normal(301).double(),), {"threshold": taskloom.magnitude_threshold(normal(301), rank=9)})


CONTRACTS = (
    Contract("magnitude_threshold", taskloom.magnitude_threshold, threshold_cases),
    Contract("magnitude_histogram", taskloom.magnitude_histogram, histogram_cases),
    Contract("magnitude_mask", taskloom.magnitude_mask, mask_cases),
)

"""Contracts of the ops on bit-packed masks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from contract import Case, Contract

import taskloom

SIZES = (0, 1, 7, 8, 9, 64, 1001, (1 << 18) + 13)


def random_mask(*shape: int, seed: int = 0, density: float = 0.3) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def pack_mask_cases() -> Iterator[Case]:
    for size in SIZES:
        yield Case(f"{size}", (random_mask(size),))
    yield Case("scalar", (torch.tensor(True),))
    yield Case("transposed", (random_mask(31, 65).t(),))
    yield Case("offset", (random_mask(100)[3::2],))
    yield Case("expanded", (random_mask(1, 33).expand(5, 33),))


def unpack_mask_cases() -> Iterator[Case]:
    for size in SIZES:
        yield Case(f"{size}", (taskloom.pack_mask(random_mask(size)), (size,)))
    yield Case("scalar", (torch.tensor([1], dtype=torch.uint8), ()))
    yield Case("matrix", (taskloom.pack_mask(random_mask(31, 65)), (31, 65)))
    yield Case("strided", (taskloom.pack_mask(random_mask(160))[::2], (80,)))
    yield Case("tail bits", (torch.full((2,), 255, dtype=torch.uint8), (9,)))


CONTRACTS = (
    Contract("pack_mask", taskloom.pack_mask, pack_mask_cases),
    Contract("unpack_mask", taskloom.unpack_mask, unpack_mask_cases),
)

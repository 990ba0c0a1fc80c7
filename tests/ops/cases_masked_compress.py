"""Contracts of masked_compress and masked_restore."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from contract import Case, Contract
from samples import random_packed, set_tail, weights

import taskloom


def masked_compress_cases() -> Iterator[Case]:
    for numel, density, dtype in (
        (1, 1.0, torch.float32),
        (129, 1.0, torch.float16),
        (1001, 0.5, torch.bfloat16),
        (64, 0.0, torch.float64),
    ):
        yield Case(f"{numel} at {density}", (weights(numel, dtype=dtype), random_packed(numel, density=density)))
    numel = 2 * (1 << 18) + 13
    yield Case("three chunks", (weights(numel), random_packed(numel)))
    yield Case("bytes", (torch.arange(100, dtype=torch.int8), random_packed(100)))
    yield Case("empty", (torch.empty(3, 0), torch.empty(0, dtype=torch.uint8)))
    yield Case("transposed", (weights(31, 7).t(), set_tail(random_packed(217), 217)))
    yield Case("gradient", (weights(77).requires_grad_(), random_packed(77)))


def masked_restore_cases() -> Iterator[Case]:
    for case in masked_compress_cases():
        values, packed = case.args
        compressed = taskloom.masked_compress(values.detach(), packed).requires_grad_(values.requires_grad)
        yield Case(case.name, (compressed, packed, torch.zeros_like(values)))
    compressed = taskloom.masked_compress(weights(200), random_packed(200))
    yield Case("strided", (compressed.repeat_interleave(2)[::2], random_packed(200), weights(8, 25)))
    yield Case("mixed", (compressed.half(), random_packed(200), weights(200, seed=1)))


CONTRACTS = (
    Contract("masked_compress", taskloom.masked_compress, masked_compress_cases),
    Contract("masked_restore", taskloom.masked_restore, masked_restore_cases),
)

"""Contracts of masked_update, masked_update_ and masked_switch_."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from contract import Case, Contract
from samples import random_packed, set_tail, weights

import taskloom

SPARSE, DENSE = 0.02, 0.5


def masked_update_cases() -> Iterator[Case]:
    mixes = ((torch.float32, torch.float16, DENSE), (torch.bfloat16, torch.float32, DENSE), (torch.float16, torch.bfloat16, SPARSE))
    for place, (target, delta, density) in enumerate(mixes):
        shape = (13, 79 + place)
        mask = taskloom.unpack_mask(random_packed(shape[0] * shape[1], density=density), shape)
        yield Case(f"{target}-{delta}", (weights(*shape, dtype=target), mask, weights(*shape, seed=1, dtype=delta), -0.7))
    numel = (1 << 18) + 13
    for density in (SPARSE, DENSE):
        yield Case(f"two chunks at {density}", (weights(numel), random_packed(numel, density=density), weights(numel, seed=1)))
    yield Case("float64", (weights(100), set_tail(random_packed(100), 100), weights(100, seed=1, dtype=torch.float64)))
    yield Case("empty", (torch.empty(3, 0), torch.empty(3, 0, dtype=torch.bool), torch.empty(3, 0)))
    yield Case("scalar", (torch.tensor(1.0), torch.tensor(True), torch.tensor(2.0)))
    mask = taskloom.unpack_mask(random_packed(217), (31, 7)).t()
    yield Case("strided", (weights(31, 7).t(), mask, weights(7, 31, seed=1)[:, :1].expand(7, 31)))


def differentiable_cases() -> Iterator[Case]:
    yield from masked_update_cases()
    target, delta = weights(77).requires_grad_(), weights(77, seed=1, dtype=torch.float16).requires_grad_()
    yield Case("gradient", (target, random_packed(77), delta, 0.5))


def masked_switch_cases() -> Iterator[Case]:
    mixes = ((torch.float32, torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16, torch.float32))
    mixes += ((torch.float16, torch.float32, torch.bfloat16), (torch.float32, torch.float64, torch.float16))
    for place, (target, base, delta) in enumerate(mixes):
        for density in (SPARSE, DENSE):
            numel = 1001 + place
            old = random_packed(numel)
            new = old ^ random_packed(numel, seed=1, density=density)
            tensors = (weights(numel, dtype=target), weights(numel, seed=1, dtype=base), weights(numel, seed=2, dtype=delta))
            yield Case(f"{target}-{base}-{delta}-{density}", (*tensors, old, set_tail(new, numel)))
    numel = (1 << 18) + 13
    tensors = (weights(numel), weights(numel, seed=1), weights(numel, seed=2))
    yield Case("two chunks", (*tensors, random_packed(numel), random_packed(numel, seed=1)))
    yield Case("empty", (torch.empty(0), torch.empty(0), torch.empty(0), torch.empty(0).byte(), torch.empty(0).byte()))
    strided = (weights(31, 7).t(), weights(7, 31), weights(7, 62)[:, ::2])
    yield Case("strided", (*strided, random_packed(217), random_packed(217, seed=1)))


CONTRACTS = (
    Contract("masked_update", taskloom.masked_update, differentiable_cases),
    Contract("masked_update_", taskloom.masked_update_, masked_update_cases, mutates=(0,)),
    Contract("masked_switch_", taskloom.masked_switch_, masked_switch_cases, mutates=(0,)),
)

"""Contract of mask_count."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from contract import Case, Contract
from samples import random_packed, set_tail

import taskloom


def mask_count_cases() -> Iterator[Case]:
    for tasks, numel, k in ((1, 9, 1), (2, 64, 2), (7, 4097, 3), (8, 1001, 9), (9, 4096, 0), (64, 5003, 20), (130, 777, 40)):
        masks = [random_packed(numel, seed=seed) for seed in range(tasks)]
        yield Case(f"{tasks} of {numel}, k {k}", (torch.stack(masks), numel, k))
    numel = (1 << 18) + 13
    yield Case("sequence", ([random_packed(numel, seed=seed, density=0.5) for seed in range(3)], numel, 2))
    yield Case("tail bits", ([set_tail(random_packed(13, seed=seed), 13) for seed in range(3)], 13, 2))
    yield Case("strided", (torch.stack([random_packed(80, seed=seed) for seed in range(10)]).t().contiguous().t()[::2], 80, 2))
    yield Case("empty", (torch.empty(3, 0, dtype=torch.uint8), 0, 1))


CONTRACTS = (Contract("mask_count", taskloom.mask_count, mask_count_cases),)

"""The CUDA kernels of expert_sort: one block or many, any number of warps beside the experts' counts, and ids that are out of range."""

from __future__ import annotations

import emulated
import pytest
import torch
from cases_expert import chosen
from torch import Tensor

import taskloom


def _both(ids: Tensor, experts: int, block: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What the emulated kernels give, and what the CPU's gives."""
    assert taskloom.ops is not None
    emulated.library()
    ours = torch.ops.taskloom_emulated.expert_sort.default(ids, experts, block)
    return ours, torch.ops.taskloom.expert_sort.default(ids, experts, block)


# Tokens, experts, experts per token, and entries of a block.
SIZES = {
    "one block": (900, 64, 8, 16),
    "one block of few warps": (300, 1500, 5, 0),
    "several blocks": (3100, 33, 4, 7),
    "several blocks of few warps": (1700, 3000, 6, 0),
    "most experts": (40, 6112, 3, 2),
    "one entry": (1, 2, 1, 4),
}


@pytest.mark.parametrize("name", SIZES)
def test_order_is_that_of_the_cpu(name: str, order: str) -> None:
    tokens, experts, k, block = SIZES[name]
    for got, expected in zip(*_both(chosen(tokens, experts, k), experts, block), strict=True):
        assert got.equal(expected)


@pytest.mark.parametrize("tokens", [50, 3100])
@pytest.mark.parametrize("wrong", [-1, 9, 2**31 - 1])
def test_ids_out_of_range(tokens: int, wrong: int) -> None:
    emulated.library()
    ids = chosen(tokens, 9, 4)
    ids[tokens // 2, 1] = wrong
    with pytest.raises(RuntimeError, match="expert_sort: ids: expected the numbers of experts"):
        torch.ops.taskloom_emulated.expert_sort.default(ids, 9, 8)


def test_too_many_experts() -> None:
    emulated.library()
    with pytest.raises(RuntimeError, match="num_experts: expected 1 to 6112 on a GPU, got 7000"):
        torch.ops.taskloom_emulated.expert_sort.default(chosen(2, 9, 1), 7000, 0)

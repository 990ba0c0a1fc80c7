"""The forms that the benchmark of aTLAS's composition compares, and that they compute the same."""

from __future__ import annotations

import pytest
import torch

import arms_atlas
import bench_atlas_composition as bench
from arms_atlas import OURS, Pool

SHAPES = ((24, 40), (40,), (6, 2, 3))


@pytest.mark.parametrize(("dtype", "groups"), [(torch.float16, 1), (torch.float32, 1), (torch.float16, 10)])
def test_arms_agree(dtype: torch.dtype, groups: int) -> None:
    pool = Pool.make(SHAPES, 3, dtype, groups)
    found = arms_atlas.arms(pool, compiled=False)
    calls = {name: bench.passes(arm, pool) for name, arm in found.items()}
    assert len(found) >= 3
    bench.gate(found, calls, pool)


def test_the_gate_refuses_other_results() -> None:
    pool = Pool.make(SHAPES, 2, torch.float32)
    found = arms_atlas.arms(pool, compiled=False)
    doubled = found["loop"].compose
    found["loop"] = arms_atlas.Arm(lambda coef: doubled(2 * coef))
    calls = {name: bench.passes(arm, pool) for name, arm in found.items()}
    with pytest.raises(AssertionError, match="relative error"):
        bench.gate(found, calls, pool)


def test_what_must_move() -> None:
    pool = Pool.make([(8,), (3, 4)], 5, torch.float16, groups=2)
    entries = 8 + 12
    assert pool.backward_bytes == entries * (5 * 2 + 4 + 1)
    assert pool.forward_bytes == entries * (5 * 2 + 4 + 1 + 4)


def test_the_vision_transformer_has_the_published_size() -> None:
    numel = sum(torch.Size(shape).numel() for shape in arms_atlas.vision_transformer(768))
    assert numel == 87849216


def test_only_copies_are_kept() -> None:
    plain = arms_atlas.arms(Pool.make(SHAPES, 2, torch.float16), compiled=False)
    assert plain["einsum on a stack"].kept == 2 * 4 * (24 * 40 + 40 + 36)
    assert plain[OURS].kept == plain["loop"].kept == 0
    grouped = arms_atlas.arms(Pool.make(SHAPES, 2, torch.float16, groups=10), compiled=False)
    assert grouped["loop, one-hot"].kept == 10 * 2 * (24 * 40 + 40 + 36)

"""sparse_merge's CUDA kernels beyond the contract's cases: whole vectors and their ends, many blocks, many tasks, long rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import emulated
import pytest
import torch
from contract import Recorder, assert_same_bits, copied
from samples import checkpoints
from torch import Tensor

import taskloom

TIES: dict[str, Any] = {"select": "magnitude", "density": 0.3, "elect": "sign_sum", "combine": "disjoint_mean"}
DARE: dict[str, Any] = {"select": "dropout", "density": 0.4, "rescale": "density", "seed": 3}
ELECTED_DARE = {**DARE, "elect": "sign_sum", "zero_sign": "majority"}
BREADCRUMBS: dict[str, Any] = {"select": "magnitude", "density": 0.4, "gamma": 0.1}
DELLA: dict[str, Any] = {"select": "rank_dropout", "density": 0.5, "epsilon": 0.2, "rescale": "density", "seed": 9}


@pytest.fixture(autouse=True, scope="module")
def emulated_ops() -> None:
    emulated.library()


def assert_like_the_cpu(base: Tensor | None, tuned: Sequence[Tensor], weight: Any = 1.0, **named: Any) -> None:
    """A merge in the emulator has the bits of the CPU's, and so it has where it goes into one of its tensors."""
    first = tuned[0] if base is None else base
    with taskloom.backend("native"), Recorder() as recorder:
        taskloom.sparse_merge(base, tuned, weight, **named, out=torch.empty_like(first))
    op, args, kwargs = recorder.calls[-1]
    arguments = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | kwargs
    results = []
    for merge in (op, torch.ops.taskloom_emulated.sparse_merge_out.default):
        for into in ("out", "tuned" if base is None else "base"):
            own = copied(arguments)
            if into == "tuned":
                own["out"] = own["tuned"][-1]
            elif into == "base":
                own["out"] = own["base"]
            merge(**own)
            results.append(own["out"])
    for expected, got in zip(results[:2], results[2:], strict=True):
        assert_same_bits(got, expected)


def quantised(*shape: int, tasks: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, list[Tensor]]:
    """Tensors with few distinct values, so that thresholds fall among many equal magnitudes."""
    generator = torch.Generator().manual_seed(5)
    base, *tuned = ((torch.randn(*shape, generator=generator) * 3).round().to(dtype) for _ in range(tasks + 1))
    return base, tuned


@pytest.mark.parametrize("numel", [1, 8, 13, 2054])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, TIES, DARE], ids=["sum", "ties", "dare"])
def test_vectors_and_what_is_left_of_them(numel: int, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    base, tuned = checkpoints(numel, dtype=dtype, tasks=3)
    assert_like_the_cpu(base, tuned, [0.5, 1.0, -0.3], **settings)
    if settings != TIES:
        assert_like_the_cpu(None, tuned, 0.7, **settings)


@pytest.mark.parametrize(("tasks", "settings"), [(3, TIES), (5, BREADCRUMBS), (8, TIES), (9, TIES), (1, DARE), (7, DARE), (21, DARE)])
def test_elections_of_any_number_of_tasks(tasks: int, settings: dict[str, Any]) -> None:
    base, tuned = quantised(403, tasks=tasks)
    weight = [1.0 - 0.1 * task for task in range(tasks)]
    assert_like_the_cpu(base, tuned, weight, **{**settings, "elect": "sign_sum", "zero_sign": "majority"})


def test_ties_end_in_any_block() -> None:
    base, tuned = quantised(40_003, tasks=2)
    assert_like_the_cpu(base, tuned, [1.0, 0.5], **{**TIES, "density": [0.17, 0.8], "gamma": 0.05})


@pytest.mark.parametrize("settings", [{}, {"combine": "weighted_mean"}, ELECTED_DARE], ids=["sum", "mean", "dare"])
def test_a_hundred_tasks(settings: dict[str, Any]) -> None:
    base, tuned = checkpoints(523, dtype=torch.bfloat16, tasks=100)
    assert_like_the_cpu(base, tuned, [0.01 * task for task in range(100)], **settings)


def test_more_tasks_than_shared_memory_holds() -> None:
    base, tuned = checkpoints(40, tasks=800)
    assert_like_the_cpu(base, tuned, 0.001, elect="sign_sum")


@pytest.mark.parametrize("settings", [{}, TIES, ELECTED_DARE, DELLA], ids=["sum", "ties", "dare", "della"])
def test_unaligned_tensors(settings: dict[str, Any]) -> None:
    base, tuned = checkpoints(7, 300, dtype=torch.bfloat16, tasks=3)
    views = [torch.cat([task.new_zeros(1), task.reshape(-1)])[1:].view(7, 300) for task in tuned]
    assert_like_the_cpu(base, views, 0.6, **settings)
    assert_like_the_cpu(base, [tuned[0], views[1], tuned[2].float()], 0.6, **settings)


@pytest.mark.parametrize(
    ("rows", "length", "dtype"),
    [(21, 3, torch.float32), (5, 257, torch.float64), (1, 4901, torch.float32), (1, 3301, torch.float64)],
)
def test_rows_longer_than_shared_memory_and_shorter_than_a_vector(rows: int, length: int, dtype: torch.dtype) -> None:
    base, tuned = quantised(rows, length, tasks=2, dtype=dtype)
    assert_like_the_cpu(base, tuned, 0.5, **DELLA)
    assert_like_the_cpu(base, tuned, 0.5, **{**DELLA, "rescale": "none"}, vote="selected", consensus_k=1)
    assert_like_the_cpu(base, tuned, 0.5, **BREADCRUMBS, scope="row", elect="sign_count")


@pytest.mark.parametrize("tasks", [1, 6, 13])
def test_statistics_of_any_number_of_tasks(tasks: int) -> None:
    base, tuned = quantised(4103 if tasks == 1 else 803, tasks=tasks)
    with taskloom.backend("native"), Recorder() as recorder:
        _, expected = taskloom.sparse_merge(base, tuned, 0.5, **TIES, statistics=True)
    _, args, kwargs = recorder.calls[-1]
    got = taskloom.SparseMergeStatistics(*torch.ops.taskloom_emulated.sparse_merge_statistics_out.default(*args, **kwargs))
    for name in ("kept", "conflicts", "nonfinite", "sign_sum"):
        assert getattr(got, name).equal(getattr(expected, name))
    deltas = torch.stack([task.double() - base.double() for task in tuned])
    assert got.dots.equal(deltas @ deltas.T), "sums of small integers are exact"

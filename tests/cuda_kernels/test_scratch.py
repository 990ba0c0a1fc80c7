"""What the account of device memory says that the ops take, against what the CUDA kernels' wrappers allocate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emulated
import pytest
import torch
from torch import Tensor

import taskloom
from taskloom.merge.device import account
from taskloom.merge.device.account import scratch
from taskloom.merge.device.model import ModelFacts
from taskloom.merge.device.tensors import merge_tensors
from taskloom.merge.plan import Stages, TensorJob, TensorSource, TensorTarget
from taskloom.merge.torch_dtypes import TORCH_DTYPES

TASKS = 3
# Tables, thresholds, the states of a search: what does not grow with a tensor.
SMALL = 100_000
RANKS: dict[str, Any] = {"select": "magnitude", "rank_begin": (5,) * TASKS, "rank_end": (900,) * TASKS}
STAGES: dict[str, dict[str, Any]] = {
    "sum": {},
    "ties": {**RANKS, "elect": "sign_sum", "combine": "disjoint_mean"},
    "breadcrumbs of rows": {**RANKS, "scope": "row", "rescale": "l1"},
    "dare": {"select": "dropout", "density": (0.5,) * TASKS, "rescale": "l1", "elect": "sign_count"},
    "della": {"select": "rank_dropout", "density": (0.5,) * TASKS, "epsilon": (0.1,) * TASKS, "rescale": "l1", "elect": "sign_sum"},
    "della by density": {"select": "rank_dropout", "density": (0.5,) * TASKS, "epsilon": (0.1,) * TASKS, "rescale": "density"},
}


def _peak(call: Callable[[], Any]) -> int:
    """The most bytes that were allocated at once."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    changes = sorted((event.start_ns(), event.nbytes()) for event in profile.kineto_results.events() if event.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def test_peak_counts_what_is_held_together() -> None:
    def call() -> None:
        for _ in range(2):
            first, second = torch.empty(1_000_000), torch.empty(500_000)
            del first, second

    assert 6_000_000 <= _peak(call) < 7_000_000


@pytest.mark.parametrize("dtypes", [("BF16",) * 4, ("F64", "BF16", "F64", "F64")])
@pytest.mark.parametrize("shape", [(40, 1024), (2, 33_000)])
@pytest.mark.parametrize("name", STAGES)
def test_kernels_take_no_more_than_the_account_says(
    name: str, shape: tuple[int, int], dtypes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    emulated.set_order("forward")
    kernel = torch.ops.taskloom_emulated.sparse_merge_statistics_out.default

    def merge(arguments: dict[str, Any], out: Tensor) -> taskloom.SparseMergeStatistics:
        return taskloom.SparseMergeStatistics(*kernel(**arguments, out=out))

    monkeypatch.setattr("taskloom.merge.device.tensors.merge_with_statistics", merge)
    monkeypatch.setattr(account, "_segments", lambda count, tensors=1: count)
    # The emulator's own limits are smaller than a GPU's, so that several ranges are tested.
    stages = Stages(weight=(1.0,) * TASKS, **STAGES[name])
    base, *sources = (TensorSource(0, 0, dtype) for dtype in dtypes)
    job = TensorJob("w", shape, TensorTarget(0, 0, "BF16"), base, tuple(sources), stages)
    generator = torch.Generator().manual_seed(0)
    origin, *tuned = (torch.randn(shape, generator=generator).to(TORCH_DTYPES[source.dtype]) for source in (base, *sources))
    out = torch.zeros(shape, dtype=torch.bfloat16)
    peak = _peak(lambda: merge_tensors(job, 3, origin, tuned, out, ModelFacts({}), magnitude_histogram=False))
    assert 0 < peak <= scratch(job) + SMALL

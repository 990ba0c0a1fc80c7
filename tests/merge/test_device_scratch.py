"""What the account of device memory says that the ops take, against what the Triton launchers allocate. No kernel runs."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest
import torch
from device_runs import Allocations
from torch import Tensor

import taskloom
from taskloom.merge.device import account
from taskloom.merge.device.account import scratch
from taskloom.merge.device.model import Cuts, ModelFacts
from taskloom.merge.device.tensors import merge_tensors
from taskloom.merge.plan import Stages, TensorJob, TensorSource, TensorTarget
from taskloom.merge.torch_dtypes import TORCH_DTYPES

pytest.importorskip("triton")

# Tables, thresholds, and histograms of digits: what does not grow with a tensor.
SMALL = 400_000
SHAPE = (500, 1024)
TASKS = 3


def _stages(**changes: Any) -> Stages:
    return Stages(weight=(1.0,) * TASKS, **changes)


RANKS: dict[str, Any] = {"select": "magnitude", "rank_begin": (5,) * TASKS, "rank_end": (900,) * TASKS}
STAGES = {
    "sum": _stages(),
    "ties": _stages(**RANKS, elect="sign_sum", combine="disjoint_mean"),
    "ties of the model": _stages(**RANKS, scope="model", elect="sign_sum", zero_sign="majority"),
    "breadcrumbs of rows": _stages(**RANKS, scope="row", rescale="l1"),
    "dare": _stages(select="dropout", density=(0.5,) * TASKS, rescale="l1", elect="sign_count"),
    "della": _stages(select="rank_dropout", density=(0.5,) * TASKS, epsilon=(0.1,) * TASKS, rescale="l1", elect="sign_sum"),
    "consensus": _stages(vote="tall", consensus_k=2, tall_mask_lambda=(0.4,) * TASKS),
    "slerp": Stages(weight=(1.0,), interpolation="slerp", t=0.3),
}


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops run the Triton launchers, in view of a dispatch mode, and launch nothing."""
    kernels = importlib.import_module("taskloom.triton_kernels.masked")
    for found in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{found.name}")
        if hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", lambda *arguments, **constants: None)

    def merge(arguments: dict[str, Any], out: Tensor) -> taskloom.SparseMergeStatistics:
        return taskloom.SparseMergeStatistics(*kernels.sparse_merge_statistics_out(**arguments, out=out))

    monkeypatch.setattr("taskloom.merge.device.tensors.merge_with_statistics", merge)
    histogram = lambda tuned, base, shift, wide: kernels.magnitude_histogram(tuned, base, shift, 0, wide)  # noqa: E731
    monkeypatch.setattr("taskloom.magnitude_histogram", histogram, raising=False)
    monkeypatch.setattr(account, "_segments", lambda count, tensors=1: count)


def test_rows_are_sorted_in_the_pieces_that_the_account_takes() -> None:
    launcher = importlib.import_module("taskloom.triton_kernels.masked.sparse_merge")
    assert account._SORTED == launcher.RANKED_ENTRIES


@pytest.mark.usefixtures("on_triton")
@pytest.mark.parametrize("dtypes", [("BF16",) * 4, ("BF16", "F32", "F16", "BF16"), ("F64", "BF16", "F64", "F64")])
@pytest.mark.parametrize("name", STAGES)
def test_launchers_take_no_more_than_the_account_says(name: str, dtypes: tuple[str, ...]) -> None:
    plot = name in ("ties", "slerp")
    stages = STAGES[name]
    base, *sources = (TensorSource(0, 0, dtype) for dtype in dtypes)
    job = TensorJob("w", SHAPE, TensorTarget(0, 0, "BF16"), base, tuple(sources[: len(stages.weight)]), stages)
    origin = torch.zeros(SHAPE, dtype=TORCH_DTYPES[base.dtype])
    tuned = [torch.zeros(SHAPE, dtype=TORCH_DTYPES[source.dtype]) for source in job.tuned]
    out = torch.zeros(SHAPE, dtype=torch.bfloat16)
    wide = any(tensor.dtype == torch.float64 for tensor in (origin, *tuned))
    cuts = Cuts(torch.zeros(TASKS, 2, dtype=torch.float64 if wide else torch.float32), torch.ones(TASKS, 2, dtype=torch.int64))
    facts = ModelFacts({"w": cuts} if stages.scope == "model" else {})
    with Allocations() as seen:
        merge_tensors(job, 3, origin, tuned, out, facts, magnitude_histogram=plot)
    assert seen.peak <= scratch(job, magnitude_histogram=plot) + SMALL

"""Every CUDA kernel, run by the emulator, gives what the CPU's kernels give: discrete results to the bit, values within one ulp."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from contract import REORDERED_SUMS, Case, Contract, Recorder, assert_close, assert_same_bits, assert_within_an_ulp, copied
from torch import Tensor
from torch.utils import _pytree as pytree

import taskloom
from taskloom.ops._backends import OPS

OPS_FOLDER = Path(__file__).parents[1] / "ops"
CONTRACTS = tuple(contract for path in sorted(OPS_FOLDER.glob("cases_*.py")) for contract in importlib.import_module(path.stem).CONTRACTS)
# The same by their place in what is returned, where float64 holds sums of parts that were added in float32.
PARTLY_FLOAT32_SUMS = (("sparse_merge_statistics_out", 2),)
# Work that is matrix products, or that Triton serves on GPUs.
WITHOUT_KERNEL_PREFIXES = (
    "batch_norm_silu",
    "channel_scale",
    "expert_combine",
    "kernel_",
    "lora_feature_gate",
    "lowrank_",
    "manifold_loss",
    "multi_gate_",
    "prefix_",
    "ragged_prefix_",
    "rmm_linear",
    "rmm_reconstruct",
    "stream_softmax_",
    "weighted_ce",
    "window_",
)
WITHOUT_KERNEL = {name for name in OPS if name.startswith(WITHOUT_KERNEL_PREFIXES)}
SAMPLES = [pytest.param(contract, case, id=f"{contract.op}-{case.name}") for contract in CONTRACTS for case in contract.cases()]


def _results(op: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """What a call returns, and its arguments afterwards: those that the op changes, and those that it must not."""
    args, kwargs = copied(args), copied(kwargs)
    returned = op(*args, **kwargs)
    return [leaf for leaf in pytree.tree_leaves((returned, args, kwargs)) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize(("contract", "case"), SAMPLES)
def test_kernels_match_the_cpu(contract: Contract, case: Case, order: str) -> None:
    with taskloom.backend("native"), Recorder() as recorder, torch.enable_grad():
        contract.run(case)
    for op, args, kwargs in recorder.calls:
        name = op.name().partition("::")[2]
        if name in WITHOUT_KERNEL:
            continue
        twin = getattr(torch.ops.taskloom_emulated, name).default
        got, expected = _results(twin, args, kwargs), _results(op, args, kwargs)
        assert len(got) == len(expected)
        for place, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
            if (name, place) in PARTLY_FLOAT32_SUMS:
                assert_close(ours.float(), theirs.float())
            else:
                (assert_close if name in REORDERED_SUMS else assert_within_an_ulp)(ours, theirs)
        for once, twice in zip(got, _results(twin, args, kwargs), strict=True):
            assert_same_bits(once, twice)


def test_which_ops_have_no_kernel() -> None:
    names = {name.removeprefix("taskloom::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("taskloom::")}
    assert {name for name in names if not emulated.has_kernel(name)} == set(WITHOUT_KERNEL)

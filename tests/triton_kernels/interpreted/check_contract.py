"""Every case of every op's contract: the kernels agree with the reference, and to the bit with the native ones."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from contract import REORDERED_RESULTS, REORDERED_SUMS, Case, Contract, Recorder, assert_close, copied
from torch import Tensor
from torch.utils import _pytree as pytree

import taskloom

OPS = Path(__file__).parents[2] / "ops"
CONTRACTS = tuple(contract for path in sorted(OPS.glob("cases_*.py")) for contract in importlib.import_module(path.stem).CONTRACTS)

# A program of any size takes milliseconds in the interpreter: of the ops that launch many, these cases are run every time, of the others
# all but a few; the rest is slow.
FAST = {
    "magnitude_threshold": {"63", "empty", "scalar", "mixed", "specials", "transposed", "list with ties", "rows of one", "no rows"},
    "magnitude_mask": {"packed band", "density", "scalar", "empty", "one row", "packed one row", "specials", "two thresholds"},
    "sparse_merge": {"ties", "dare l1", "della", "masks", "consensus", "no base", "empty", "scalar", "specials rank_dropout none"},
    "sparse_merge_statistics_out": {
        "ties",
        "dare l1",
        "della",
        "no base",
        "empty",
        "scalar",
        "mixed",
        "into one of its tensors",
        "overflow",
    },
    "sparse_merge_out": {"scalar", "strided out", "della"},
}
SLOW = {
    "lora_feature_gate": {"two tiles"},
    "lora_feature_gate_backward": {"two tiles"},
    "magnitude_histogram": {"large"},
    "mask_count": {"130 of 777, k 40", "64 of 5003, k 20", "sequence"},
    "block_scale_merge_backward": {"two chunks in groups"},
    "weighted_ce_backward": {"several tiles"},
    "lowrank_merge": {"wide rank", "two pieces"},
    "window_layer_norm": {"two pieces"},
    "window_layer_norm_backward": {"two pieces"},
    "window_group_norm_silu": {"channels of their own"},
    "lowrank_merge_": {"wide rank", "two pieces"},
    "lowrank_norm": {"wide rank", "two pieces"},
    "multi_gate_combine": {"pieces", "many experts"},
    "multi_gate_combine_backward": {"pieces", "many experts"},
    "stream_softmax_mix_backward": {"chunks"},
}


def _is_slow(op: str, case: str) -> bool:
    return case not in FAST[op] if op in FAST else case in SLOW.get(op, ())


def _samples() -> list[object]:
    return [
        pytest.param(
            contract,
            case,
            id=f"{contract.op}-{case.name}",
            marks=[pytest.mark.slow] if _is_slow(contract.op, case.name) else [],
        )
        for contract in CONTRACTS
        for case in contract.cases()
    ]


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Equal, with NaN in the same places."""
    if ours.is_floating_point():
        return ours.isnan().equal(theirs.isnan()) and ours.nan_to_num(0.5, torch.inf, -torch.inf).equal(
            theirs.nan_to_num(0.5, torch.inf, -torch.inf)
        )
    return ours.equal(theirs)


@pytest.mark.parametrize(("contract", "case"), _samples())
def test_contract(contract: Contract, case: Case) -> None:
    with taskloom.backend("triton"), Recorder(("taskloom", "taskloom_triton")) as recorder:
        got = contract.run(case)
    names = {str(op) for op, _, _ in recorder.calls}
    assert f"taskloom_triton.{contract.op}.default" in names
    assert all(name.startswith("taskloom_triton.") for name in names)
    results = {}
    for backend in ("reference", "native"):
        with taskloom.backend(backend):
            results[backend] = contract.run(case)
    for place, (ours, expected, native) in enumerate(zip(got, results["reference"], results["native"], strict=True)):
        assert_close(ours, expected, contract.single)
        assert ours.stride() == native.stride()
        assert contract.op in REORDERED_SUMS or (contract.op, place) in REORDERED_RESULTS or _same(ours, native)


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.op)
def test_opcheck(contract: Contract) -> None:
    cases = {case.name: case for case in contract.cases()}
    case = cases["scalar"] if contract.op in FAST else next(iter(cases.values()))
    with taskloom.backend("triton"), Recorder(("taskloom_triton",)) as recorder:
        contract.run(case)
    for op, args, kwargs in recorder.calls:
        results = [leaf for leaf in pytree.tree_leaves(op(*copied(args), **copied(kwargs))) if isinstance(leaf, torch.Tensor)]
        traced = () if any(result.isnan().any() for result in results) else ("test_aot_dispatch_dynamic",)
        torch.library.opcheck(op, args, kwargs, test_utils=("test_schema", "test_autograd_registration", "test_faketensor", *traced))

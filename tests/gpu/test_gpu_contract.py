"""Every case of every op's contract on a GPU: against the CPU, and twice."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import REORDERED_RESULTS, REORDERED_SUMS, Case, Contract, assert_close, assert_same_bits, assert_within_an_ulp, copied
from on_gpu import require, tensors_of, to_device
from torch import Tensor

import taskloom

pytestmark = pytest.mark.gpu

CONTRACTS = tuple(
    contract
    for path in sorted((Path(__file__).parents[1] / "ops").glob("cases_*.py"))
    for contract in importlib.import_module(path.stem).CONTRACTS
)
SAMPLES = [pytest.param(contract, case, id=f"{contract.op}-{case.name}") for contract in CONTRACTS for case in contract.cases()]


def _arguments(case: Case) -> tuple[Any, Any]:
    args, kwargs = to_device(copied((case.args, dict(case.kwargs))))
    return args, kwargs


def _run(contract: Contract, case: Case) -> list[Tensor]:
    args, kwargs = _arguments(case)
    result = contract.wrapper(*args, **kwargs)
    return tensors_of((result, [args[place] for place in contract.mutates]))


def _compare(contract: Contract, case: Case, place: int, got: Tensor, expected: Tensor) -> None:
    if contract.op in REORDERED_SUMS or case.kwargs.get("rescale") == "l1":
        assert_close(got, expected, contract.single)
    elif (contract.op, place) in REORDERED_RESULTS:
        # Their parts are float32 sums.
        assert_close(got.float(), expected.float())
    else:
        assert_within_an_ulp(got, expected)


@pytest.mark.parametrize(("contract", "case"), SAMPLES)
def test_a_gpu_gives_what_the_cpu_gives(contract: Contract, case: Case, gpu_backend: str) -> None:
    require(contract.op, gpu_backend)
    with taskloom.backend("native"):
        expected = contract.run(case)
    got = _run(contract, case)
    again = _run(contract, case)
    assert len(got) == len(expected)
    for place, (ours, once_more, theirs) in enumerate(zip(got, again, expected, strict=True)):
        assert ours.device.type == "cuda" or not ours.is_floating_point()
        assert_same_bits(ours.cpu(), once_more.cpu())
        _compare(contract, case, place, ours.cpu(), theirs)


def test_mixed_devices_are_refused() -> None:
    mask = torch.ones(9, dtype=torch.bool)
    with pytest.raises(ValueError, match="all tensors must be on one device, got cuda:0 and cpu"):
        taskloom.masked_update(torch.ones(9, device="cuda"), mask, torch.ones(9, device="cuda"))


def test_what_was_chosen_is_kept_for_each_device() -> None:
    mask = torch.rand(1001) < 0.5
    for device in ("cpu", "cuda", "cpu"):
        assert taskloom.pack_mask(mask.to(device)).device.type == device

"""The comparisons of the GPU tests themselves, on the CPU: what they keep and what they must tell apart."""

from __future__ import annotations

import pytest
import torch
from contract import assert_within_an_ulp, copied, ulps_apart
from on_gpu import tensors_of, to_device
from test_gpu_contract import CONTRACTS

import taskloom


def test_strides_and_offsets_are_kept() -> None:
    grid = torch.randn(6, 10)
    given = [grid[1:, ::2], grid.t(), grid[:1].expand(4, 10), torch.tensor(1.0), torch.empty(0, 3)]
    for moved, source in zip(to_device(given, "cpu"), given, strict=True):
        assert moved.equal(source)
        assert (moved.stride(), moved.storage_offset()) == (source.stride(), source.storage_offset())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_unit_in_the_last_place_passes_and_two_do_not(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, -2.0, 0.0, torch.nan, torch.inf]).to(dtype)
    step = torch.finfo(dtype).eps
    near, far = (values * (1 + count * step) for count in (1, 2))
    assert (ulps_apart(near[:3], values[:3]), ulps_apart(far[:3], values[:3])) == (1, 2)
    assert_within_an_ulp(near, values)
    assert_within_an_ulp(torch.tensor([-0.0]).to(dtype), torch.tensor([0.0]).to(dtype))
    with pytest.raises(AssertionError):
        assert_within_an_ulp(far, values)
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(AssertionError):
            assert_within_an_ulp(torch.tensor([wrong]).to(dtype), torch.tensor([1.0]).to(dtype))


def test_a_wrong_bit_of_a_discrete_result_does_not_pass() -> None:
    with pytest.raises(AssertionError):
        assert_within_an_ulp(torch.tensor([True, False]), torch.tensor([True, True]))


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.op)
def test_the_way_of_a_case_to_a_device_changes_nothing(contract: object) -> None:
    for case in list(contract.cases())[:3]:
        args, kwargs = to_device(copied((case.args, dict(case.kwargs))), "cpu")
        with taskloom.backend("native"):
            result = contract.wrapper(*args, **kwargs)
            expected = contract.run(case)
        got = tensors_of((result, [args[place] for place in contract.mutates]))
        assert len(got) == len(expected)
        for ours, theirs in zip(got, expected, strict=True):
            assert_within_an_ulp(ours, theirs)
